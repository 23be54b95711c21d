"""A model in the shape of Qwen2.5-7B, four of its layers, of random weights, under `--max-memory`.

    python -m benchmarks.limits --threads 2 --out benchmarks/results-limits.md

The limit is what the hidden states of the calibration do not fit into beside what a layer takes, so they lie in files.
Every command is a process of its own whose RssAnon is read every 20 ms. The model (4 GB) is written to a temporary
folder and removed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import Stage, config, make_model, mebibytes, watch
from benchmarks.support.provenance import head, publish, table
from trimcli.demo import MODEL, measurement_text
from trimcli.files.tensors import TensorSpec, write_tensors
from trimcli.options import parse_size

SHAPES = {"layers": 4, "hidden": 3584, "intermediate": 18944, "heads": 28, "kv_heads": 4, "vocabulary": 152064}


def model_in(folder: Path) -> Path:
    """The model, with the tokenizer of the embedded one."""
    directory = make_model(folder, config(argparse.Namespace(**SHAPES)) | {"tie_word_embeddings": False})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, directory / name)
    return directory


def tokens_in(folder: Path, shape: tuple[int, int]) -> Path:
    """Random tokens to calibrate on."""
    path, generator = folder / "tokens.safetensors", torch.Generator().manual_seed(0)
    samples = torch.randint(SHAPES["vocabulary"], shape, generator=generator, dtype=torch.int32)
    write_tensors(path, {"tokens": TensorSpec(torch.int32, shape)}, lambda _: samples)
    return path


def refused(words: list[str]) -> str:
    """What `trim` says to these words. Raises RuntimeError where it goes on."""
    done = subprocess.run([sys.executable, "-m", "trimcli", *words], capture_output=True, text=True, check=False)
    if done.returncode != 1:
        raise RuntimeError(f"{' '.join(words)} ended with status {done.returncode}:\n{done.stderr}")
    return " ".join(done.stderr.split()).removeprefix("trim: ")


def commands(folder: Path, given: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """What is measured, in order: name and words."""
    run = ["--cache-dir", str(folder / "cache"), "--device", "cpu", "--dtype", given.dtype]
    run += ["--max-memory", given.limit, "--json"]
    (folder / "topics.txt").write_text(measurement_text())
    model, masks = str(model_in(folder)), str(folder / "masks.safetensors")
    tokens = str(tokens_in(folder, (given.samples, given.seqlen)))
    yield "prune", ["prune", model, "-o", masks, "--sparsity", "0.7", "--tokens", tokens, *run]
    text = ["--ppl", str(folder / "topics.txt"), "--seqlen", str(given.seqlen), "--max-windows", str(given.windows)]
    yield "eval --masks", ["eval", model, "--masks", masks, *text, *run]


def row(stage: Stage, limit: int) -> tuple[str, ...]:
    """A line of the table."""
    planned: dict[str, Any] = json.loads(stage.said)["planned"]
    host = planned["peak_host_bytes"]
    states = planned["hidden_states"] + (f" ({mebibytes(planned['spill_bytes'])})" if planned["spill_bytes"] else "")
    verdict = "PASS" if stage.peak <= limit and abs(host / stage.peak - 1) <= 0.2 else "over"
    figures = mebibytes(limit), mebibytes(host), mebibytes(stage.peak), f"{host / stage.peak - 1:+.0%}"
    return (f"`{stage.name}`", *figures, states, f"{stage.seconds:.0f}", verdict)


def main() -> None:
    """Write the model, run the commands, write the table; status 1 where one took more than its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--limit", default="3GiB", help="--max-memory (default 3GiB)")
    parser.add_argument("--dtype", default="float32", help="of the computation (default float32)")
    parser.add_argument("--samples", type=int, default=24, help="calibration samples (default 24)")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens of a sample or window (default 2048)")
    parser.add_argument("--windows", type=int, default=4, help="windows measured (default 4)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--work", type=Path, help="where the model is written for the time (default: as tempfile has it)"
    )
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: print)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    limit, stages, said = parse_size("--limit", given.limit), list[Stage](), ""
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        for command, words in commands(Path(name), given):
            if not said:
                said = refused([*words, "--method", "sparsegpt", "--save-model", f"{name}/pruned"])
                said = said.replace(f"{name}/", "")
            stages.append(watch(f"trim {command}", words, given.threads))
            print(stages[-1], file=sys.stderr, flush=True)
    rows = [row(stage, limit) for stage in stages]
    facts = {
        "model": "random weights, bfloat16: four decoder layers in the shape of Qwen2.5-7B, vocabulary 152064, untied",
        "computed in": f"{given.dtype}; in float32 a layer is 889 MiB, the embedding 2079 MiB",
        "calibration": f"{given.samples} samples of {given.seqlen} random tokens; wanda, 70%",
        "measured on": f"{given.windows} windows of {given.seqlen} tokens of Python's help topics",
        "the same with `--method sparsegpt`": f"refused before any work: {said}",
    }
    columns = ("command", "limit", "planned", "peak RssAnon", "off by", "hidden states in", "seconds", "")
    publish([*head("A 7B model under a limit of memory", "limits", facts), *table(columns, rows)], given.out)
    sys.exit(any(line[-1] != "PASS" for line in rows))


if __name__ == "__main__":
    main()
