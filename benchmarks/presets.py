"""What the presets cost: seconds and memory of each beside a plain wanda prune of the same model on the same samples.

    python -m benchmarks.presets --model DIR --calibrate TRAIN.json.gz --nsamples 256 --seqlen 256 --out FILE.md

Every prune is a process of its own with an empty stage cache, one after the other; the least of --repeat runs counts,
and of as many more as fit into half a minute: what the others are compared with is short.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.support.provenance import head, publish, table
from trimcli.demo import MODEL, write_texts
from trimcli.methods.presets import PRESETS

# Runs go on until they have taken so many seconds.
STEADY = 30.0


def trim(command: str, given: argparse.Namespace, *words: str) -> dict[str, Any]:
    """The JSON document that `trim` prints; calibrated as the options say."""
    drawn = ["--dataset", given.calibrate, "--nsamples", given.nsamples, "--seqlen", given.seqlen]
    line = [
        sys.executable,
        "-m",
        "trimcli",
        command,
        given.model,
        *drawn,
        "--sparsity",
        given.sparsity,
        *words,
        "--json",
    ]
    found: dict[str, Any] = json.loads(subprocess.check_output([str(word) for word in line], stderr=subprocess.DEVNULL))
    return found


def cost(given: argparse.Namespace, *words: str) -> dict[str, float]:
    """Seconds of a prune, its own peak memory and the planned one in bytes, and the planned forward passes."""
    planned = trim("plan", given, *words, "--save-model", "unwritten")
    runs = list[dict[str, Any]]()
    while len(runs) < given.repeat or sum(run["seconds"] for run in runs) < STEADY:
        with tempfile.TemporaryDirectory() as folder:
            made = ("-o", f"{folder}/masks", "--save-model", f"{folder}/saved", "--cache-dir", f"{folder}/cache")
            runs.append(trim("prune", given, *words, *made))
    least = min(runs, key=lambda run: run["seconds"])
    passes = planned["forward_passes"]
    return {
        "seconds": least["seconds"],
        "planned": planned["peak_host_bytes"],
        "passes": passes,
        **least["peak_memory"],
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="model directory (default: the embedded one)")
    parser.add_argument("--calibrate", type=Path, help="calibration text (default: the demo's)")
    parser.add_argument("--nsamples", type=int, default=256)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: print)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given.calibrate = given.calibrate or write_texts(Path(folder)).calibration
        asked: dict[str, tuple[str, ...]] = {"wanda": (), **{name: ("--preset", name) for name in PRESETS}}
        asked["learned masks"] = ("--refine", "learned", "--alloc", "search")
        found = {name: cost(given, *words) for name, words in asked.items()}
    wanda = found["wanda"]
    rows = []
    for name, made in found.items():
        ratios = [f"{made[key] / wanda[key]:.2f}" for key in ("seconds", "passes")]
        memory = [f"{made[key] / 2**20:.0f}" for key in ("anonymous", "planned")]
        rows.append([name, f"{made['seconds']:.1f}", *ratios, *memory])
    samples = f"{given.calibrate.name}, {given.nsamples} samples of {given.seqlen} tokens, sparsity {given.sparsity:g}"
    lines = head("What the presets cost", "presets", {"model": given.model.name, "calibrated on": samples})
    columns = ("recipe", "seconds", "of wanda's", "planned passes, of wanda's", "peak MiB", "planned MiB")
    publish([*lines, *table(columns, rows)], given.out)


if __name__ == "__main__":
    main()
