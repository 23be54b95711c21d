"""What `trim plan` says of memory against what `trim prune` took, method by method.

    python -m benchmarks.plan_memory --out benchmarks/results-plan_memory.md

Every prune is a process of its own, on two decoder layers of random weights in the shapes of Qwen2.5-1.5B, on the
CPU; its peak is the anonymous memory that `--json` reports. The estimate is the plan's for the same command line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import config, make_model, mebibytes
from benchmarks.support.provenance import head, publish, table
from trimcli.files.tensors import TensorSpec, write_tensors

METHODS = {
    "magnitude": ["--method", "magnitude"],
    "wanda": [],
    "wanda --no-propagate": ["--no-propagate"],
    "wanda 2:4": ["--sparsity-type", "2:4"],
    "wanda variant": ["--use-variant"],
    "wanda + TRIM": ["--use-trim"],
    "magnitude + TRIM": ["--method", "magnitude", "--use-trim"],
    "sparsegpt": ["--method", "sparsegpt"],
    "sparsegpt 2:4": ["--method", "sparsegpt", "--sparsity-type", "2:4"],
    "sparsegpt, Gram in float64": ["--method", "sparsegpt", "--gram-dtype", "float64"],
    "sparsegpt + TRIM": ["--method", "sparsegpt", "--use-trim"],
    "obs alone": ["--method", "obs"],
    "wanda + Barber": ["--prune-barber"],
    "sparsegpt + Barber": ["--method", "sparsegpt", "--prune-barber", "--retain-reconstruction"],
}
SHAPES = {"layers": 2, "hidden": 1536, "intermediate": 8960, "heads": 12, "kv_heads": 2, "vocabulary": 32768}


def trim(*words: object) -> Any:
    """The JSON document of a command. Raises RuntimeError with what it said when it fails."""
    command = [sys.executable, "-m", "trimcli", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    """Measure every method, write the table; status 1 where an estimate is more than a fifth off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=32, help="calibration samples (default 32)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a sample (default 256)")
    parser.add_argument("--only", help="only the methods whose name contains this")
    parser.add_argument("--work", type=Path, help="where the model is kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: print)")
    given = parser.parse_args()
    work: Path = given.work or Path(tempfile.gettempdir()) / "trim-benchmarks"
    work.mkdir(parents=True, exist_ok=True)
    model = make_model(work, config(argparse.Namespace(**SHAPES)))
    rows = []
    worst = 0.0
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        shape = (given.samples, given.seqlen)
        samples = torch.randint(SHAPES["vocabulary"], shape, generator=torch.Generator().manual_seed(0))
        tokens = folder / "tokens.safetensors"
        write_tensors(tokens, {"tokens": TensorSpec(torch.int32, shape)}, lambda _: samples.int())
        for method, words in METHODS.items():
            if given.only and given.only not in method:
                continue
            target = [] if "--sparsity-type" in words else ["--sparsity", 0.7]
            command = [model, "--tokens", tokens, "--device", "cpu", "--cache-dir", folder / "cache", *target, *words]
            command += ["--save-model", folder / "pruned"] if "sparsegpt" in words else []
            planned = trim("plan", *command)["peak_host_bytes"]
            peak = trim("prune", *command, "-o", folder / "masks", "--force")["peak_memory"]["anonymous"]
            off = planned / peak - 1
            worst = max(worst, abs(off))
            print(f"{method}: {mebibytes(planned)} planned, {mebibytes(peak)} taken, {off:+.0%}", file=sys.stderr)
            rows.append((method, mebibytes(planned), mebibytes(peak), f"{off:+.0%}"))
    facts = {
        "model": "two decoder layers of random weights in the shapes of Qwen2.5-1.5B, bfloat16, vocabulary 32768",
        "calibration": f"{given.samples} samples of {given.seqlen} random tokens",
    }
    columns = ("method", "planned", "taken", "off by")
    publish([*head("Memory as planned and as taken", "plan_memory", facts), *table(columns, rows)], given.out)
    sys.exit(worst > 0.2)


if __name__ == "__main__":
    main()
