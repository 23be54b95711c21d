"""What the presets cost: seconds and memory of each beside a plain wanda prune of the same model on the same samples.

    python -m benchmarks.presets --model DIR --calibrate TRAIN.json.gz --nsamples 256 --seqlen 256 --out FILE.md

Every prune is a process of its own with an empty stage cache, one after the other. Before every other one a wanda prune
runs, since a machine's speed changes from minute to minute; of seconds the medians count, of memory the most. `--shapes
Qwen2.5-7B --device cuda --dtype bfloat16` says what layers of a large model cost, where no such model is at hand.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.speed import SHAPES, VOCABULARY, shaped
from benchmarks.support.provenance import head, publish, table
from trimcli.demo import MODEL, write_texts
from trimcli.files.tensors import TensorSpec, write_tensors
from trimcli.methods.presets import PRESETS

# Of a model with random weights.
LAYERS = 2


def trim(command: str, given: argparse.Namespace, *words: str) -> dict[str, Any]:
    """The JSON document that `trim` prints; calibrated and computed as the options say."""
    where = ["--sparsity", given.sparsity, "--device", given.device, "--dtype", given.dtype]
    line = [sys.executable, "-m", "trimcli", command, given.model, *given.drawn, *where, *words, "--json"]
    found: dict[str, Any] = json.loads(subprocess.check_output([str(word) for word in line], stderr=subprocess.DEVNULL))
    return found


def pruned(given: argparse.Namespace, *words: str) -> dict[str, Any]:
    """What one prune says of itself."""
    with tempfile.TemporaryDirectory() as folder:
        made = ("-o", f"{folder}/masks", "--save-model", f"{folder}/saved", "--cache-dir", f"{folder}/cache")
        return trim("prune", given, *words, *made)


def costs(given: argparse.Namespace, asked: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, float]]:
    """By recipe the median of its seconds, how many runs that is of, its peak memory in bytes, and what was planned."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in asked}
    pairs: list[tuple[str, ...]] = [("wanda", name) for name in asked if name != "wanda"] or [("wanda",)]
    for name in [name for pair in pairs * given.rounds for name in pair]:
        runs[name].append(pruned(given, *asked[name]))
        print(f"{name}: {runs[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    found = {}
    for name, made in runs.items():
        planned = trim("plan", given, *asked[name], "--save-model", "unwritten")
        peaks = {kind: max(run["peak_memory"][kind] for run in made) for kind in made[0]["peak_memory"]}
        kept = {key: planned[key] for key in ("peak_host_bytes", "peak_device_bytes", "forward_passes")}
        found[name] = {"seconds": median(run["seconds"] for run in made), "runs": len(made), **kept, **peaks}
    return found


def drawn(given: argparse.Namespace, work: Path) -> list[str]:
    """The options that say what to calibrate on: text, or random tokens for a model of random weights."""
    if given.shapes is None:
        text = given.calibrate or write_texts(work).calibration
        return ["--dataset", str(text), "--nsamples", str(given.nsamples), "--seqlen", str(given.seqlen)]
    file, shape = work / "tokens.safetensors", (given.nsamples, given.seqlen)
    tokens = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    write_tensors(file, {"tokens": TensorSpec(torch.int32, shape)}, lambda _: tokens.int())
    return ["--tokens", str(file)]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="model directory (default: the embedded one)")
    parser.add_argument("--calibrate", type=Path, help="calibration text (default: the demo's)")
    parser.add_argument("--nsamples", type=int, default=256)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--shapes", choices=SHAPES, help=f"random weights in these shapes, {LAYERS} layers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the computation")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every recipe; wanda has one before each of them")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: print)")
    asked: dict[str, tuple[str, ...]] = {"wanda": (), **{name: ("--preset", name) for name in PRESETS}}
    asked["learned masks"] = ("--refine", "learned", "--alloc", "search")
    parser.add_argument("--recipes", nargs="*", choices=asked, help="only these rows; wanda is always there")
    given = parser.parse_args()
    if given.recipes is not None:
        asked = {name: words for name, words in asked.items() if name in ("wanda", *given.recipes)}
    with tempfile.TemporaryDirectory() as folder:
        if given.shapes is not None:
            given.model = shaped(given.shapes, LAYERS, Path(folder))
        given.drawn = drawn(given, Path(folder))
        found = costs(given, asked)
    gpu = "cuda" in found["wanda"]
    measured = ("anonymous", "peak_host_bytes", *(("cuda", "peak_device_bytes") if gpu else ()))
    rows = []
    for name, made in found.items():
        ratios = [f"{made[key] / found['wanda'][key]:.2f}" for key in ("seconds", "forward_passes")]
        memory = [f"{made[key] / 2**20:.0f}" for key in measured]
        rows.append([name, str(made["runs"]), f"{made['seconds']:.1f}", *ratios, *memory])
    what = f"{given.shapes} shapes, {LAYERS} layers, random" if given.shapes else given.model.name
    text = "random tokens" if given.shapes else given.calibrate.name if given.calibrate else "the demo's text"
    samples = f"{text}, {given.nsamples} samples of {given.seqlen} tokens, sparsity {given.sparsity:g}"
    how = f"{given.dtype} on {given.device}"
    lines = head("What the presets cost", "presets", {"model": what, "calibrated on": samples, "computed in": how})
    columns = ["recipe", "runs", "seconds", "of wanda's", "planned passes, of wanda's", "peak MiB", "planned MiB"]
    publish([*lines, *table([*columns, *(["device MiB", "planned device MiB"] if gpu else [])], rows)], given.out)


if __name__ == "__main__":
    main()
