"""Peak anonymous memory of the stages on a random-weight model of the shapes of Qwen2.5-1.5B.

    python -m benchmarks.memory --threads 2 --samples 8 --out benchmarks/results-memory.md

Every stage is a process of its own whose RssAnon is read every 20 ms: mapped pages of the shards are the
kernel's and do not count. Allowed are the larger of one decoder layer and the embedding in compute
precision, the hidden states, and 1 GiB for the interpreter and its libraries. The model (3 GB) stays in
--work for the next time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.provenance import head, publish, table
from trimcli.files.cache import digest
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.tensors import TensorSpec, write_tensors
from trimcli.model.device import compute_device, compute_dtype
from trimcli.model.skeleton import Skeleton

INTERVAL = 0.02
GIB = 1 << 30
SHARD_BYTES = 500_000_000


@dataclass(frozen=True)
class Stage:
    """What a command took: peak RssAnon in bytes, and seconds; and what it said on stdout."""

    name: str
    peak: int
    seconds: float
    said: str = ""


def config(given: argparse.Namespace) -> dict[str, Any]:
    """config.json of a Qwen2 with the shapes that the options give."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": given.hidden,
        "intermediate_size": given.intermediate,
        "num_hidden_layers": given.layers,
        "num_attention_heads": given.heads,
        "num_key_value_heads": given.kv_heads,
        "vocab_size": given.vocabulary,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def make_model(work: Path, document: dict[str, Any]) -> Path:
    """The directory of a random-weight model of this config inside `work`, written unless it is there."""
    directory = work / f"qwen2-{digest(document)[:8]}"
    directory.mkdir(exist_ok=True)
    index = directory / "model.safetensors.index.json"
    (directory / "config.json").write_text(json.dumps(document, indent=1))
    if index.is_file():
        return directory
    model = Skeleton(Checkpoint.open(directory, weights=False)).model
    specs = {name: TensorSpec(torch.bfloat16, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, spec in specs.items():
        if shards[-1] and sum(one.nbytes for one in shards[-1].values()) + spec.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = spec
    home = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        home.update(dict.fromkeys(shard, file))
        write_tensors(directory / file, shard, lambda name: random_tensor(name, specs[name]), {"format": "pt"})
    size = sum(spec.nbytes for spec in specs.values())
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": home}, indent=1))
    return directory


def random_tensor(name: str, spec: TensorSpec) -> Tensor:
    """A parameter's values, the same each time: norms one, biases zero, others Gaussian of deviation 0.02."""
    if len(spec.shape) == 1:
        return torch.full(spec.shape, 0.0 if name.endswith(".bias") else 1.0, dtype=spec.dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.empty(spec.shape, dtype=spec.dtype).normal_(std=0.02, generator=generator)


def allowance(model: Path, samples: int, seqlen: int) -> tuple[int, str]:
    """The bytes a stage may take, and of what they are made up."""
    checkpoint = Checkpoint.open(model)
    dtype = compute_dtype("auto", checkpoint, compute_device("cpu"))
    skeleton = Skeleton(checkpoint, dtype=dtype)
    layer = max(sum(one.numel() for one in layer.module.parameters()) for layer in skeleton.layers)
    table_of_tokens = skeleton.model.get_input_embeddings()
    embedding = table_of_tokens.weight.numel()
    states = samples * seqlen * table_of_tokens.embedding_dim
    parts = [number * dtype.itemsize for number in (layer, embedding, states)]
    told = "max({} layer, {} embedding) + {} hidden states + 1024 MiB".format(*map(mebibytes, parts))
    name = str(dtype).removeprefix("torch.")
    return max(parts[:2]) + parts[2] + GIB, f"{told}, in {name}, the compute precision here"


def watch(name: str, words: Iterable[str], threads: int) -> Stage:
    """Run `trim` with `words` in a process of its own. Raises RuntimeError when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started, peak = time.monotonic(), 0
    # Files: a full pipe would stop the process.
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "trimcli", *words]
        process = subprocess.Popen(command, stdout=said, stderr=log, env=environment)
        try:
            while process.poll() is None:
                peak = max(peak, anonymous_memory(process.pid))
                time.sleep(INTERVAL)
        finally:
            process.kill()
        if process.wait():
            log.seek(0)
            raise RuntimeError(f"{name} ended with status {process.returncode}:\n{log.read()[-4000:]}")
        said.seek(0)
        return Stage(name, peak, time.monotonic() - started, said.read())


def anonymous_memory(pid: int) -> int:
    """RssAnon of a process in bytes, 0 once it has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0) * 1024


def stages(model: Path, folder: Path, given: argparse.Namespace) -> Iterable[Stage]:
    """Calibrate, prune without and with propagation, apply: each as it ends."""
    shape = (given.samples, given.seqlen)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(given.vocabulary, shape, generator=generator, dtype=torch.int32)
    tokens, calibration, masks = (folder / f"{name}.safetensors" for name in ("tokens", "calibration", "masks"))
    write_tensors(tokens, {"tokens": TensorSpec(torch.int32, shape)}, lambda _: samples)
    target = ["--calibration", str(calibration), "--sparsity", str(given.sparsity)]
    commands = {
        "calibrate": ["-o", str(calibration), "--tokens", str(tokens)],
        "prune --no-propagate": ["-o", str(masks), *target],
        "prune": ["-o", str(masks), "--force", *target],
        "apply-masks": [str(masks), "-o", str(folder / "pruned")],
    }
    for name, words in commands.items():
        where = [] if name == "apply-masks" else ["--cache-dir", str(folder / "cache"), "--device", "cpu"]
        stage = watch(
            f"trim {name}", [*name.split(" ")[:1], str(model), *words, *name.split(" ")[1:], *where], given.threads
        )
        print(f"{stage.name}: {mebibytes(stage.peak)}, {stage.seconds:.0f} s", file=sys.stderr, flush=True)
        yield stage


def mebibytes(number: int) -> str:
    """Bytes as MiB."""
    return f"{number / (1 << 20):.0f} MiB"


def main() -> None:
    """Make the model, run the stages, write the table; status 1 where a stage took more than allowed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    shapes = {"layers": 28, "hidden": 1536, "intermediate": 8960, "heads": 12, "kv-heads": 2, "vocabulary": 151936}
    for name, number in shapes.items():
        parser.add_argument(f"--{name}", type=int, default=number, help=f"default {number}")
    parser.add_argument("--samples", type=int, default=8, help="calibration samples (default 8)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a sample (default 256)")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, help="where the model is kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: print)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    work: Path = given.work or Path(tempfile.gettempdir()) / "trim-benchmarks"
    work.mkdir(parents=True, exist_ok=True)
    model = make_model(work, config(given))
    allowed, told = allowance(model, given.samples, given.seqlen)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        found = list(stages(model, Path(folder), given))
    weights = sum(spec.nbytes for spec in map(Checkpoint.open(model).spec, Checkpoint.open(model).keys()))
    facts = {
        "model": f"random weights, bfloat16, {mebibytes(weights)}: {given.layers} layers, "
        f"hidden {given.hidden}, intermediate {given.intermediate}, {given.heads} heads, "
        f"{given.kv_heads} of keys and values, vocabulary {given.vocabulary}, tied",
        "calibration": f"{given.samples} samples of {given.seqlen} random tokens",
        "allowed": told,
    }
    rows = [
        (f"`{stage.name}`", mebibytes(stage.peak), mebibytes(allowed), f"{stage.seconds:.0f}", verdict(stage, allowed))
        for stage in found
    ]
    columns = ("command", "peak RssAnon", "allowed", "seconds", "")
    publish([*head("Peak memory of the stages", "memory", facts), *table(columns, rows)], given.out)
    sys.exit(any(stage.peak > allowed for stage in found))


def verdict(stage: Stage, allowed: int) -> str:
    """Whether a stage stayed within what is allowed."""
    return "PASS" if stage.peak <= allowed else "over"


if __name__ == "__main__":
    main()
