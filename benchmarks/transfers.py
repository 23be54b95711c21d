"""Count the copies and waits of every stage on an accelerator, which is simulated on the CPU.

    python -m benchmarks.transfers --before eb82b00.json --out benchmarks/results-transfers.md

The model is the embedded one, 4 layers of 7 matrices, each worked through in as many blocks as one of 4096 x 11008;
figures are totals of a command, by matrix. --counts FILE keeps the totals as JSON, for the --before of another tree,
which is called as the file is.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

from benchmarks.support.provenance import head, publish, table
from tests.simulated_device import Counts, simulated
from tests.trim_cli import save_tokens, trim_json
from trimcli.demo import MODEL, measurement_text

MATRICES, BATCH = 28, ("--batch-size", 2)
# Sizes of blocks: those of rows of 128 x 352, and the tokens whose logits are held at a time.
SMALL = {
    "trimcli.methods.masks._BLOCK": 128 * 352 // 11,
    "trimcli.methods.ranking._SMALLEST_BLOCK": 1,
    "trimcli.evaluation.perplexity.LOGITS": 1,
    "trimcli.evaluation.perplexity.TOKENS": 8,
}


def commands(folder: Path) -> Iterator[tuple[str, tuple[object, ...]]]:
    """What is counted, in the order in which one command's output is another one's input."""
    half, groups = ("--sparsity", 0.5), ("--sparsity-type", "2:4")
    sparsegpt = (*BATCH, "--method", "sparsegpt", "--save-model", folder / "updated", "--force")
    text = ("--ppl", folder / "text.txt", "--seqlen", 32, "--max-windows", 16, *BATCH)
    calibration = folder / "calibration"

    def prune(*options: object) -> tuple[object, ...]:
        return ("prune", MODEL, "-o", folder / "masks", "--force", "--calibration", calibration, *options)

    def allocate(*options: object) -> tuple[object, ...]:
        return ("alloc-layers", MODEL, "-o", folder / "ratios", "--force", *half, *options)

    yield "calibrate", ("calibrate", MODEL, "-o", calibration, "--tokens", folder / "tokens", *BATCH)
    yield "alloc-layers owl", allocate("--method", "owl", "--calibration", calibration)
    yield "alloc-layers alpha", allocate("--method", "alpha")
    yield "magnitude", prune(*half, "--method", "magnitude")
    yield "wanda, no propagation", prune(*half, "--no-propagate")
    yield "wanda 2:4", prune(*groups, *BATCH)
    yield "wanda variant", prune(*half, *BATCH, "--use-variant")
    yield "TRIM", prune(*half, *BATCH, "--use-trim")
    yield "TRIM, inputs recollected", prune(*half, *BATCH, "--use-trim", "--input-recalc")
    yield "SparseGPT", prune(*half, *sparsegpt)
    yield "SparseGPT 2:4", prune(*groups, *sparsegpt)
    yield "SparseGPT with TRIM", prune(*half, *sparsegpt, "--use-trim")
    for unit in ("block", "layer", "output1", "input1"):
        yield f"wanda, Barber by {unit}", prune(*half, *BATCH, "--prune-barber", "--prune-granularity", unit)
    yield "wanda", prune(*half, *BATCH, "--save-model", folder / "pruned")
    yield "eval under masks", ("eval", MODEL, "--masks", folder / "masks", *text)
    yield "eval of a directory", ("eval", folder / "pruned", *text)


def count() -> dict[str, Counts]:
    """What every command costs."""
    found = {}
    with contextlib.ExitStack() as stack:
        folder, sim = Path(stack.enter_context(tempfile.TemporaryDirectory())), stack.enter_context(simulated())
        for place, size in SMALL.items():
            stack.enter_context(patch(place, size))
        save_tokens(folder / "tokens", vocabulary=2048, nsamples=8, seqlen=32)
        (folder / "text.txt").write_text(measurement_text()[:8000])
        for stage, words in commands(folder):
            with sim.counting() as found[stage]:
                trim_json(*words, "--device", "sim:0", "--dtype", "float32", "--cache-dir", folder / "cache")
            print(f"{stage}: {found[stage]}", file=sys.stderr, flush=True)
    return found


def by_matrix(before: Counts | None, after: Counts) -> Iterator[str]:
    """The cells of a row: to the host, to the device, other waits."""
    for kind in asdict(after):
        old = f"{getattr(before, kind) / MATRICES:.1f} → " if before else ""
        yield f"{old}{getattr(after, kind) / MATRICES:.1f}"


def main() -> None:
    """Count, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", type=Path, help="the counts of another tree, to show beside")
    parser.add_argument("--counts", type=Path, help="keep the counts in this JSON file")
    parser.add_argument("--out", type=Path, help="the Markdown file to write")
    given = parser.parse_args()
    before: Mapping[str, Mapping[str, int]] = json.loads(given.before.read_text()) if given.before else {}
    found = count()
    if given.counts:
        given.counts.write_text(json.dumps({stage: asdict(counts) for stage, counts in found.items()}, indent=1))
    rows = [
        (stage, *by_matrix(Counts(**before[stage]) if stage in before else None, counts))
        for stage, counts in found.items()
    ]
    facts = {
        "model": f"the embedded one, {MATRICES} matrices; 8 samples of 32 tokens, 2 a batch; 16 windows of 32 tokens",
        **({"before the arrows": given.before.stem} if given.before else {}),
        "counted": "the whole command, divided by the number of matrices; a copy that waits is no wait besides",
        "TRIM": "a copy either way is an iterate's: counts of the rows there, sums of their outputs back",
    }
    columns = ("stage", "copies to the host", "copies to the device", "other waits")
    publish([*head("Copies and waits a matrix", "transfers", facts), *table(columns, rows)], given.out)


if __name__ == "__main__":
    main()
