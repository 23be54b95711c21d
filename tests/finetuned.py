"""Small pruned models, and how they are trained in tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from tests.small_models import masks_for, random_model, save
from trimcli.commands.apply import apply_masks
from trimcli.commands.finetune import FinetuneSummary, finetune
from trimcli.commands.options import ApplyOptions
from trimcli.training.options import FinetuneOptions

SAMPLES, LENGTH = 33, 16


def pruned_model(
    config: PretrainedConfig, home: Path, *, format: Any = "dense", dtype: torch.dtype = torch.float32, **masks: Any
) -> Path:
    """`home` with `dense`, `masks`, `pruned` and `tokens`; returns `pruned`. masks: as `masks_for` takes them."""
    home.mkdir(exist_ok=True)
    save(random_model(config, dtype=dtype), home / "dense")
    masks_for(home / "dense", home / "masks", **(masks or {"sparsity": 0.75}))
    apply_masks(str(home / "dense"), home / "masks", home / "pruned", ApplyOptions(format=format))
    save_counting(home / "tokens")
    return home / "pruned"


def save_counting(path: Path) -> Path:
    """A tokens file in which every sample counts up: a rule that a few steps learn, for held-out samples, too."""
    starts = torch.arange(SAMPLES).unsqueeze(1) * 7
    save_file({"tokens": ((starts + torch.arange(LENGTH)) % 64).int()}, path)
    return path


def options(model: Path, **fields: Any) -> FinetuneOptions:
    """Six steps of eight of the samples beside a model, two held out, on the CPU."""
    usual: dict[str, Any] = {
        "mode": "full",
        "tokens": model.parent / "tokens",
        "steps": 6,
        "batch_size": 4,
        "accumulate": 2,
        "every": 2,
        "lr": 1e-2,
        "device": "cpu",
    }
    return FinetuneOptions(**{**usual, **fields})


def tuned(model: Path, output: Path, **fields: Any) -> FinetuneSummary:
    """Train it."""
    return finetune(str(model), output, options(model, **fields))


def weights(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory's single shard."""
    return load_file(directory / "model.safetensors")


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """To the bit."""
    assert one.keys() == other.keys()
    differ = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differ
