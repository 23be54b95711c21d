"""How a prune's time grows with samples, layers and parameters, and what a second rank saves.

    python -m benchmarks.scaling --out benchmarks/results-scaling.md

Wanda, propagating, on models of random weights in one process after a first prune that is not counted: a point is the
least of `--repeats` runs, taken in turns. What tells is seconds a unit, beside that of the first point: 1.00 is linear.
The ranks are torchrun's on this machine, one thread each, on the embedded model; seconds are the command's own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import config, make_model
from benchmarks.support.provenance import head, publish, table
from trimcli import CalibrateOptions, PruneOptions, prune
from trimcli.demo import MODEL
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.tensors import TensorSpec, write_tensors
from trimcli.model.skeleton import Skeleton

BASE = {"samples": 32, "layers": 4, "hidden": 512}
# Of each, the other two staying; widths whose squares grow about as 1, 2, 4.
POINTS = {"samples": (16, 32, 64), "layers": (4, 8, 16), "hidden": (512, 768, 1024)}
SEQLEN, VOCABULARY = 256, 8192
WORDS = {"samples": "samples", "layers": "decoder layers", "hidden": "weights of a layer"}


def model_of(work: Path, layers: int, hidden: int) -> Path:
    """A model of random weights, as wide in its MLP as three times its hidden states."""
    shapes = {"layers": layers, "hidden": hidden, "intermediate": 3 * hidden, "heads": hidden // 64, "kv_heads": 2}
    return make_model(work, config(argparse.Namespace(**shapes, vocabulary=VOCABULARY)))


def tokens_of(work: Path, samples: int, vocabulary: int) -> Path:
    """A file of so many samples of random tokens."""
    path, shape = work / f"tokens-{samples}-{vocabulary}.safetensors", (samples, SEQLEN)
    drawn = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)).int()
    path.unlink(missing_ok=True)
    write_tensors(path, {"tokens": TensorSpec(torch.int32, shape)}, lambda _: drawn)
    return path


def seconds_of(model: Path, tokens: Path, folder: Path) -> float:
    """Of one prune, nothing of which is kept."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run: dict[str, Any] = {"dtype": "float32", "cache_dir": Path(name) / "cache"}
        options = PruneOptions(sparsity=0.7, calibrate=CalibrateOptions(tokens=tokens, **run), **run)
        return prune(str(model), Path(name) / "masks", options).seconds


def grown(work: Path, repeats: int) -> Iterator[tuple[str, ...]]:
    """A line for each point."""
    for what, values in POINTS.items():
        points = [{**BASE, what: value} for value in values]
        models = [model_of(work, point["layers"], point["hidden"]) for point in points]
        tokens = [tokens_of(work, point["samples"], VOCABULARY) for point in points]
        skeletons = [Skeleton(Checkpoint.open(model)) for model in models]
        weights = [sum(one.numel for one in skeleton.layers[0].linears) for skeleton in skeletons]
        units = weights if what == "hidden" else values
        seconds_of(models[0], tokens[0], work)
        taken = [[seconds_of(*point, work) for point in zip(models, tokens, strict=True)] for _ in range(repeats)]
        least = [min(one) for one in zip(*taken, strict=True)]
        for unit, found in zip(units, least, strict=True):
            each = found / unit / (least[0] / units[0])
            yield WORDS[what], f"{unit:,}", f"{unit / units[0]:.2f}", f"{found:.2f}", f"{each:.2f}"
            print(what, unit, f"{found:.2f} s, {each:.2f} a unit", file=sys.stderr, flush=True)


def seconds_of_ranks(ranks: int, tokens: Path, folder: Path) -> float:
    """Of a prune of the embedded model by so many ranks of one thread."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        words = ["prune", str(MODEL), "-o", f"{name}/masks", "--sparsity", "0.7", "--tokens", str(tokens), "--json"]
        words += ["--dtype", "float32", "--device", "cpu", "--cache-dir", f"{name}/cache"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*launcher, "-m", "trimcli", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    document: dict[str, Any] = json.loads(done.stdout)
    return float(document["seconds"])


def shared(work: Path, samples: int, repeats: int, most: int) -> Iterator[tuple[str, ...]]:
    """A line for each number of ranks."""
    vocabulary = int(Checkpoint.open(MODEL).config_document["vocab_size"])
    tokens = tokens_of(work, samples, vocabulary)
    counts = [count for count in (1, 2, 4) if count <= most]
    taken = [[seconds_of_ranks(count, tokens, work) for count in counts] for _ in range(repeats)]
    least = [min(one) for one in zip(*taken, strict=True)]
    for count, found in zip(counts, least, strict=True):
        print(count, "ranks", f"{found:.2f} s", file=sys.stderr, flush=True)
        yield str(count), f"{found:.2f}", f"{least[0] / found:.2f}"


def main() -> None:
    """Measure, and write both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each point (default 3)")
    parser.add_argument("--samples", type=int, default=256, help="samples that the ranks share (default 256)")
    parser.add_argument("--ranks", type=int, default=2, help="at most so many ranks (default 2)")
    parser.add_argument("--work", type=Path, help="where the models are kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: print)")
    given = parser.parse_args()
    work: Path = given.work or Path(tempfile.gettempdir()) / "trim-benchmarks"
    work.mkdir(parents=True, exist_ok=True)
    ranks = list(shared(work, given.samples, given.repeats, given.ranks))
    growth = list(grown(work, given.repeats))
    facts = {
        "pruned": f"wanda, 70%, propagating, samples of {SEQLEN} random tokens, float32",
        "growth": f"from {BASE['samples']} samples, {BASE['layers']} layers, hidden states of {BASE['hidden']}, "
        f"an MLP of three times that, vocabulary {VOCABULARY}",
        "ranks": f"the embedded model, {given.samples} samples, one thread a rank, gloo",
    }
    lines = head("How cost grows, and what ranks save", "scaling", facts)
    columns = ("what grows", "to", "times the first", "seconds", "a unit, of the first's")
    lines += [*table(columns, growth), "", *table(("ranks", "seconds", "times faster"), ranks)]
    publish(lines, given.out)


if __name__ == "__main__":
    main()
