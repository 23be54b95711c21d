"""Tiny random models on disk, and masks for them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trimcli.files.checkpoint import Checkpoint
from trimcli.files.manifest import MASKS, manifest
from trimcli.files.masks import write_masks
from trimcli.methods.masks import lowest_per_row, n_of_m
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton

NANO = Path(__file__).parent / "data" / "nano-qwen2"
"""A trained model: Qwen2 form, 4 layers, float16, vocabulary 2,048."""

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


def llama_config(**fields: Any) -> PretrainedConfig:
    return LlamaConfig(**{**LLAMA, **TOKENS, **fields})


def gpt2_config(**fields: Any) -> PretrainedConfig:
    return GPT2Config(**{**GPT2, **TOKENS, **fields})


def random_model(config: PretrainedConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases and norms too, so that none of them is a constant
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def add_uncalled_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Llama decoder layer that is made from now on has a linear `mlp.spare` that it never calls."""
    made = LlamaDecoderLayer.__init__

    def make(layer: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        made(layer, config, *args, **kwargs)
        layer.mlp.spare = nn.Linear(config.hidden_size, 8, bias=False)

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", make)


def save(model: Any, directory: Path, *, max_shard_size: str = "5GB") -> Path:
    """As save_pretrained writes it, with small files as a tokenizer leaves them."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    (directory / "tokenizer.json").write_text('{"a": 1}')
    (directory / "merges.txt").write_text("a b\n")
    return directory


def edited_config(source: Path, target: Path, **fields: object) -> Path:
    shutil.copytree(source, target)
    config = {**json.loads((source / "config.json").read_text()), **fields}
    (target / "config.json").write_text(json.dumps(config))
    return target


def with_tensors(source: Path, target: Path, **tensors: Tensor | None) -> Path:
    """The model with some tensors replaced, or left out where None."""
    shutil.copytree(source, target)
    found = {**load_file(source / "model.safetensors"), **tensors}
    kept = {key: tensor for key, tensor in found.items() if tensor is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def skeleton_of(directory: Path) -> Skeleton:
    return Skeleton(Checkpoint.open(directory))


def save_random(config: PretrainedConfig, directory: Path) -> Path:
    """A model of this config as save_pretrained writes it: random in every parameter, float32, seed 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.1, 0.2)
    model.save_pretrained(directory)
    return directory


def masks_for(
    directory: Path,
    path: Path,
    *,
    sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None,
    keep_of: Callable[[Matrix, Tensor], Tensor] | None = None,
    names: list[str] | None = None,
    **fields: Any,
) -> Path:
    """A masks file for the model: magnitude in every row, or N:M, or what `keep_of(linear, weight)` says."""
    skeleton = skeleton_of(directory)
    target = 1 - pattern[0] / pattern[1] if pattern else sparsity

    def keep(name: str) -> Tensor:
        linear = skeleton.linears[name]
        weight = linear.read(skeleton.checkpoint).float()
        if keep_of is not None:
            return keep_of(linear, weight)
        if pattern:
            return n_of_m(weight.abs(), *pattern)
        return lowest_per_row(weight.abs(), torch.full((linear.d_out,), round(sparsity * linear.d_in)))

    linears = {name: skeleton.linears[name] for name in names or skeleton.linears}
    known = {name: {"target": target, "pattern": list(pattern) if pattern else None} for name in linears}
    document = manifest(
        MASKS,
        "prune",
        {"sparsity": sparsity},
        skeleton.fingerprint,
        changes_weights=False,
        numerics="exact",
        linears=known,
    )
    write_masks(path, {**document, **fields}, {name: linear.shape for name, linear in linears.items()}, keep)
    return path
