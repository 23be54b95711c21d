"""Image classifiers trained on scikit-learn's digits within seconds, one of each form that transformers has."""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForImageClassification, PretrainedConfig

TRAINED = 1297
COMMON: dict[str, Any] = {"num_labels": 10, "num_channels": 1, "image_size": 8, "initializer_range": 0.1}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TRANSFORMER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 4,
    **STILL,
}
STAGES: dict[str, Any] = {"patch_size": 2}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}


def _made(name: str, **fields: Any) -> Callable[[], PretrainedConfig]:
    named = [f"{name}ForImageClassification"]
    return lambda: getattr(transformers, f"{name}Config")(architectures=named, **{**COMMON, **fields})


CLASSIFIERS: dict[str, Callable[[], PretrainedConfig]] = {
    "vit": _made("ViT", **TRANSFORMER),
    "deit": _made("DeiT", **TRANSFORMER),
    "convnext": _made(
        "ConvNext", num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], layer_scale_init_value=1.0, **STAGES
    ),
    "swin": _made(
        "Swin",
        embed_dim=16,
        depths=[1, 2],
        num_heads=[2, 2],
        window_size=2,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        **STILL,
        **STAGES,
    ),
    "resnet": _made("ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck"),
}


class Digits(NamedTuple):
    """uint8 [N, 8, 8], and their labels [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def first(self, count: int) -> "Digits":
        return Digits(self.images[:count], self.labels[:count])

    def save_pictures(self, folder: Path) -> Path:
        """A folder for each class, called by its number."""
        from PIL.Image import fromarray

        for number, (image, label) in enumerate(zip(self.images, self.labels, strict=True)):
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            fromarray(image).save(folder / str(label) / f"test-{number}.png")  # no split, whatever the name says
        return folder

    def save(self, path: Path) -> Path:
        np.savez(path, images=self.images, labels=self.labels)
        return path

    @property
    def pixels(self) -> Tensor:
        """What the processor makes of them, float32 [N, 1, 8, 8]."""
        return torch.from_numpy(self.images / np.float32(255)).sub(0.5).div(0.5)[:, None]


@cache
def digits() -> tuple[Digits, Digits]:
    """Those to train and calibrate on, and those to measure on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.RandomState(0).permutation(len(found.target))
    images, labels = (found.images[order] * 15.9375).astype(np.uint8), found.target[order].astype(np.int64)
    return Digits(images[:TRAINED], labels[:TRAINED]), Digits(images[TRAINED:], labels[TRAINED:])


def random_classifier(name: str, directory: Path) -> Path:
    """The classifier with random weights, as save_pretrained writes it, with its image processor."""
    torch.manual_seed(0)
    return _saved(AutoModelForImageClassification.from_config(CLASSIFIERS[name]()), directory)


def _saved(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return directory


def train(name: str, directory: Path, *, epochs: int = 6, batch: int = 64, rate: float = 3e-3) -> Path:
    """The classifier trained on the first digits, likewise."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(CLASSIFIERS[name]()).train()
    data, generator = digits()[0], torch.Generator().manual_seed(0)
    pixels, labels = data.pixels, torch.from_numpy(data.labels)
    steps = epochs * (len(labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for place in range(len(labels) // batch):
            some = order[place * batch : (place + 1) * batch]
            loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels[some]).logits, labels[some])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return _saved(model.eval(), directory)


def classifier(name: str, factory: pytest.TempPathFactory) -> Path:
    """The trained classifier; a run of tests, however many processes it has, trains each once."""
    base = factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = folder / f"digits-{name}"
    with FileLock(f"{directory}.lock"):
        if not (directory / "preprocessor_config.json").is_file():
            train(name, directory)
    return directory


def logits(directory: Path, pixels: Tensor) -> Tensor:
    """What transformers' own model in a directory makes of pixels."""
    model = AutoModelForImageClassification.from_pretrained(directory)
    with torch.no_grad():
        found: Tensor = model(pixel_values=pixels).logits
    return found
