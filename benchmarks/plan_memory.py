"""What is said of memory before work against what the work took: `trim prune` method by method, and other stages.

    python -m benchmarks.plan_memory --out benchmarks/results-plan_memory.md

Every command is a process of its own, on two decoder layers of random weights in the shapes of Qwen2.5-1.5B, on the
CPU; its peak is the anonymous memory that `--json` reports. A prune's estimate is that of `trim plan` with the same
words, another stage's its own. The model that is trained is pruned by magnitude. Where a method takes steps they are
few: what it holds is the same from the first to the last.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import config, make_model, mebibytes
from benchmarks.support.provenance import head, publish, table
from trimcli.demo import MODEL, measurement_text
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
    "sparsegpt, 4 bits": ["--method", "sparsegpt", "--wbits", "4"],
    "admm, rows free": ["--method", "admm", "--rows", "free", "--admm-steps", "2", "--cg-steps", "2"],
    "wanda + swaps": ["--refine", "swaps"],
    "wanda + learned masks": ["--refine", "learned", "--refine-steps", "4"],
    "wanda + reconstruction": ["--reconstruct", "layer", "--reconstruct-steps", "4"],
    "wanda + auto": ["--alloc", "auto"],
    "wanda + Barber": ["--prune-barber"],
    "sparsegpt + Barber": ["--method", "sparsegpt", "--prune-barber", "--retain-reconstruction"],
}
TRAINED = ["--steps", "2", "--batch-size", "2", "--kl", "0"]
# `{model}`, `{pruned}`, `{tokens}`, `{text}`: files made here.
STAGES = {
    "calibrate": ["calibrate", "{model}", "--tokens", "{tokens}"],
    "eval --ppl": ["eval", "{model}", "--ppl", "{text}", "--max-windows", "16"],
    "finetune --mode full": ["finetune", "{pruned}", "--tokens", "{tokens}", "--mode", "full", *TRAINED],
    "the same, --gradient-checkpointing": [
        "finetune",
        "{pruned}",
        "--tokens",
        "{tokens}",
        "--mode",
        "full",
        "--gradient-checkpointing",
        *TRAINED,
    ],
    "finetune --mode lora": ["finetune", "{pruned}", "--tokens", "{tokens}", *TRAINED],
    "the same, --targets all": ["finetune", "{pruned}", "--tokens", "{tokens}", "--targets", "all", *TRAINED],
    "finetune --mode admm": [
        "finetune",
        "{pruned}",
        "--tokens",
        "{tokens}",
        "--mode",
        "admm",
        "--interval",
        "1",
        *TRAINED,
    ],
    "finetune with a teacher": [
        "finetune",
        "{pruned}",
        "--tokens",
        "{tokens}",
        "--mode",
        "full",
        "--teacher",
        "{model}",
        *TRAINED[:-2],
    ],
}
SHAPES = {"layers": 2, "hidden": 1536, "intermediate": 8960, "heads": 12, "kv_heads": 2, "vocabulary": 32768}


def trim(*words: object) -> Any:
    """The JSON document of a command. Raises RuntimeError with what it said when it fails."""
    command = [sys.executable, "-m", "trimcli", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def made_in(folder: Path, model: Path, shape: tuple[int, int]) -> dict[str, str]:
    """The files that the words of `STAGES` name."""
    samples = torch.randint(SHAPES["vocabulary"], shape, generator=torch.Generator().manual_seed(0))
    found = {"tokens": folder / "tokens.safetensors", "text": folder / "text.txt", "pruned": folder / "small"}
    write_tensors(found["tokens"], {"tokens": TensorSpec(torch.int32, shape)}, lambda _: samples.int())
    found["text"].write_text(measurement_text())
    how = ["--sparsity", 0.7, "--method", "magnitude", "--cache-dir", folder / "cache"]
    trim("prune", model, "-o", folder / "small.masks", "--save-model", found["pruned"], *how)
    return {"model": str(model), **{name: str(path) for name, path in found.items()}}


def measured(
    model: Path, folder: Path, shape: tuple[int, int], dtype: str, only: Sequence[str]
) -> Iterator[tuple[str, int, int]]:
    """Command by command the bytes planned and taken."""
    files = made_in(folder, model, shape)
    here = ["--device", "cpu", "--dtype", dtype, "--cache-dir", folder / "cache"]
    for method, words in METHODS.items():
        if not any(one in method for one in only):
            continue
        target = [] if "--sparsity-type" in words else ["--sparsity", 0.7]
        command = [model, "--tokens", files["tokens"], *here, *target, *words]
        command += ["--save-model", folder / "pruned"] if {"sparsegpt", "admm", "--reconstruct"} & {*words} else []
        planned = trim("plan", *command)["peak_host_bytes"]
        yield method, planned, trim("prune", *command, "-o", folder / "masks", "--force")["peak_memory"]["anonymous"]
    for stage, words in STAGES.items():
        if not any(one in stage for one in only):
            continue
        place = folder / "-".join(stage.split())
        out = ["-o", place] if words[0] != "eval" else ["--seqlen", shape[1]]
        done = trim(*(word.format(**files) for word in words), *here, *out)
        planned = done["planned"].get("peak_host_bytes") or done["planned"]["nbytes"]
        yield stage, planned, done["peak_memory"]["anonymous"]
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    """Measure every command, write the table; status 1 where an estimate is more than a fifth off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=32, help="calibration samples (default 32)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a sample (default 256)")
    parser.add_argument("--dtype", default="float32", help="of the computation (default float32)")
    parser.add_argument("--only", nargs="*", default=[""], help="only the commands whose name contains one of these")
    parser.add_argument("--work", type=Path, help="where the model is kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: print)")
    given = parser.parse_args()
    work: Path = given.work or Path(tempfile.gettempdir()) / "trim-benchmarks"
    work.mkdir(parents=True, exist_ok=True)
    model = make_model(work, config(argparse.Namespace(**SHAPES)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, model / name)
    rows = []
    worst = 0.0
    with tempfile.TemporaryDirectory(dir=work) as name:
        for command, planned, peak in measured(
            model, Path(name), (given.samples, given.seqlen), given.dtype, given.only
        ):
            off = planned / peak - 1
            worst = max(worst, abs(off))
            print(f"{command}: {mebibytes(planned)} planned, {mebibytes(peak)} taken, {off:+.0%}", file=sys.stderr)
            rows.append((command, mebibytes(planned), mebibytes(peak), f"{off:+.0%}"))
    facts = {
        "model": "two decoder layers of random weights in the shapes of Qwen2.5-1.5B, bfloat16, vocabulary 32768",
        "computed in": given.dtype,
        "samples": f"{given.samples} of {given.seqlen} random tokens; trained on 2 at a time",
    }
    columns = ("command", "planned", "taken", "off by")
    publish([*head("Memory as planned and as taken", "plan_memory", facts), *table(columns, rows)], given.out)
    sys.exit(worst > 0.2)


if __name__ == "__main__":
    main()
