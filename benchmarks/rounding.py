"""Perplexity and bytes of pruning and rounding together (SparseGPT with --wbits) beside either alone.

    python -m benchmarks.rounding --model DIR --calibrate TRAIN.json.gz --measure TEST.txt --out FILE.md

Every model is pruned on the same samples and packed; bytes are those of its pruned matrices, of the dense ones.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.support.provenance import head, publish, table
from trimcli import ApplyOptions, CalibrateOptions, EvaluateOptions, PruneOptions, Recipe, apply_masks, evaluate, prune
from trimcli.demo import MODEL, write_texts
from trimcli.files.packed import PackedReader
from trimcli.methods.updates.obs import ObsOptions

RUN: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
SPARSITIES = (0.0, 0.5, 0.7)
BITS = (None, 4)


def perplexities(model: Path, given: argparse.Namespace) -> list[float]:
    """Of every text of --measure."""
    texts = tuple(map(str, given.measure))
    found = evaluate(str(model), EvaluateOptions(**RUN, ppl=texts, seqlen=given.seqlen, max_windows=given.windows))
    return [one["value"] for one in found["perplexity"]]


def share(packed: Path) -> float:
    """Bytes of a packed directory's pruned matrices, of those of the dense ones."""
    reader = PackedReader(packed)
    keys = [linear["key"] for linear in reader.document["linears"].values()]
    return sum(reader.nbytes(key) for key in keys) / sum(reader.spec(key).nbytes for key in keys)


def rows(given: argparse.Namespace, folder: Path) -> Iterator[list[str]]:
    """A row for every sparsity and number of bits."""
    drawn = CalibrateOptions(**RUN, dataset=str(given.calibrate), nsamples=given.nsamples, seqlen=given.seqlen)
    for sparsity in SPARSITIES:
        for wbits in BITS:
            name, options = folder / f"{sparsity}-{wbits}", ObsOptions(wbits=wbits, group_size=given.group_size)
            model, size = given.model, "1.000"
            if sparsity or wbits:
                recipe, model = Recipe(method="sparsegpt", options=(options,)), name / "pruned"
                how: dict[str, Any] = {"calibrate": drawn, "cache_dir": folder / "cache", "save_model": model}
                name.mkdir()
                prune(
                    str(given.model),
                    name / "masks",
                    PruneOptions(**RUN, sparsity=sparsity, recipe=recipe, **how),
                    force=True,
                )
                apply_masks(str(model), name / "masks", name / "packed", ApplyOptions(format="packed"))
                size = f"{share(name / 'packed'):.3f}"
            found = [f"{value:.3f}" for value in perplexities(model, given)]
            yield [f"{sparsity:.0%}", str(wbits or 16), size, *found]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="model directory (default: the embedded one)")
    parser.add_argument("--calibrate", type=Path, help="calibration text (default: the demo's)")
    parser.add_argument(
        "--measure", type=Path, nargs="+", help="texts whose perplexity is measured (default: the demo's)"
    )
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=50)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: print)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts = write_texts(Path(folder))
        given.calibrate, given.measure = given.calibrate or texts.calibration, given.measure or [texts.measurement]
        publish(report(given, Path(folder)), given.out)


def report(given: argparse.Namespace, folder: Path) -> list[str]:
    """The lines of the results."""
    samples = f"{given.calibrate.name}, {given.nsamples} samples of {given.seqlen} tokens"
    facts = {"model": given.model.name, "calibrated on": samples, "group size": str(given.group_size)}
    lines = head("Pruning and rounding together", "rounding", facts)
    lines += [f"Perplexity by {given.windows} windows of {given.seqlen} tokens; 16: not rounded.", ""]
    columns = ["zeros", "bits", "bytes", *(text.name for text in given.measure)]
    return [*lines, *table(columns, rows(given, folder))]


if __name__ == "__main__":
    main()
