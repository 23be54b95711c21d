"""What it costs that a model proves its walk before its first use, and what it costs once that is known.

    python -m benchmarks.proof --out benchmarks/results-proof.md

The models have random bfloat16 weights in the shapes of published ones. Beside each figure stands what a command does
anyway: reading every tensor once.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.support.provenance import head, publish, table
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.tensors import TensorSpec, write_tensors
from trimcli.memory import PeakMemory
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline.proof import prove

SHAPES: dict[str, PretrainedConfig] = {
    "SmolLM2-135M": transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    ),
    "Qwen2.5-1.5B": transformers.Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ),
}  # fmt: skip


def written(config: PretrainedConfig, directory: Path) -> Path:
    """A model of this config with random weights, one tensor in memory."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    specs = {name: TensorSpec(torch.bfloat16, tuple(one.shape)) for name, one in model.named_parameters()}
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str) -> torch.Tensor:
        shape = specs[name].shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    write_tensors(directory / "model.safetensors", specs, tensor, {"format": "pt"})
    config.save_pretrained(directory)
    return directory


def measured(name: str, config: PretrainedConfig, dtype: torch.dtype) -> Iterator[str]:
    """One row: reading every tensor, opening the model, the proof, and the proof once it is known."""
    with tempfile.TemporaryDirectory() as folder:
        model = written(config, Path(folder) / "model")
        checkpoint = Checkpoint.open(model)
        started = time.perf_counter()
        for key in checkpoint.keys():  # noqa: SIM118 - no mapping
            checkpoint.load(key).to(dtype, copy=True)
        read = time.perf_counter() - started
        yield f"{name}, {checkpoint.nbytes / 2**30:.2f} GiB"
        yield str(dtype).removeprefix("torch.")
        yield f"{read:.2f}"
        for again in (False, True):
            started = time.perf_counter()
            with PeakMemory() as memory:
                skeleton = Skeleton(Checkpoint.open(model), dtype=dtype)
                if not again:
                    skeleton.fingerprint.document()
                opened = time.perf_counter() - started
                prove(skeleton, Path(folder) / "cache")
            seconds = time.perf_counter() - started
            yield f"{seconds - opened:.2f}" if not again else f"{seconds - opened:.3f}"
        yield f"{max(memory.document().values()) / 2**20:.0f}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [list(measured(name, SHAPES[name], dtype)) for name in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    columns = ("model", "computed in", "reading it, s", "proof, s", "proof again, s", "peak MiB")
    lines = head(
        "The walk's proof of itself", "proof", {"samples": "5 of 12 tokens; the model's own pass, then two walks"}
    )
    publish([*lines, *table(columns, rows)], options.out)


if __name__ == "__main__":
    main()
