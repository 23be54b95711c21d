"""Pictures into what a model takes, by the image processor that lies beside it."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trimcli.console import size
from trimcli.errors import InputError, OptionError, first_line
from trimcli.images.sources import Pictures

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSOR = "preprocessor_config.json"
MODES = {1: "L", 3: "RGB"}
# What a random crop keeps of a picture's area, and how much wider than high it may be (Szegedy et al. 2015).
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
# How many pictures a call may take, and bytes; what one of their pixels takes meanwhile.
TOGETHER, BYTES, PIXEL_BYTES = 64, 2**29, 40
# How a processor's sizes are called, and what no image model comes near: a side, and the part that a crop keeps of it.
SIZES, SIDE, KEPT = ("size", "crop_size", "pad_size"), 4096, 0.1


@dataclass(frozen=True)
class Processor:
    """A model's own image processor. channels: that its pictures have. side: of the largest squares that it makes."""

    directory: Path
    made: Any
    channels: int
    side: int

    def pixels(self, pictures: Iterable["Image"]) -> Tensor:
        """float32 [n, C, H, W] of some pictures. Raises InputError where they do not become all of one size."""
        mode = MODES[self.channels]
        try:
            converted: list[Any] = [one.convert(mode) for one in pictures]
            how = {"return_tensors": "pt"}
            if self.channels == 1:  # transformers 4 takes no picture without channels
                converted = [np.asarray(one)[..., None] for one in converted]
                how["input_data_format"] = "channels_last"
            found: Tensor = self.made(converted, **how)["pixel_values"]
        except Exception as problem:  # each processor's class fails in its own way
            what = f"the image processor in {self.directory / PROCESSOR} fails ({first_line(problem)})"
            raise InputError(f"{what}; take the model's own, which makes one size of all pictures.") from None
        if found.ndim != 4 or found.shape[1] != self.channels:
            what = f"{self.directory / PROCESSOR} makes pixels of shape {list(found.shape[1:])}"
            raise InputError(f"{what}, and the model takes {self.channels} channels; take the model's own.")
        return found.float()

    def batches(self, pictures: Iterable["Image"]) -> Iterator[Tensor]:
        """`pixels` of some pictures at a time, in order. Raises InputError for one that takes too much."""
        some: list[Image] = []
        taken = 0
        for one in pictures:
            needed = self._bytes(one)
            if some and (len(some) == TOGETHER or taken + needed > BYTES):
                yield self.pixels(some)
                some, taken = [], 0
            some.append(one)
            taken += needed
        if some:
            yield self.pixels(some)

    def _bytes(self, picture: "Image") -> int:
        """What is held at most while one becomes pixels: its shorter side becomes the processor's."""
        shorter, longer = sorted(picture.size)
        made = self.side**2 * longer // max(shorter, 1) * PIXEL_BYTES
        if made > 2 * BYTES:
            what = f"a picture of {picture.width} x {picture.height} pixels"
            raise InputError(f"{what} takes {size(made)} at the sides of {self.directory / PROCESSOR}; leave it out.")
        return max(shorter * longer * PIXEL_BYTES, made)


def load_processor(directory: Path, channels: int, *, trust_remote_code: bool = False) -> Processor:
    """The image processor of a model directory. Raises InputError where there is none or it cannot be used."""
    from transformers import AutoImageProcessor

    if channels not in MODES:
        raise InputError(f"{directory} takes pictures of {channels} channels; only 1 and 3 are supported.")
    if not (directory / PROCESSOR).is_file():
        raise InputError(f"there is no image processor in {directory}; put the model's {PROCESSOR} there.")
    try:
        made = AutoImageProcessor.from_pretrained(
            str(directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as problem:  # each processor's class fails in its own way
        what = f"the image processor in {directory / PROCESSOR} is not usable ({first_line(problem)})"
        raise InputError(f"{what}; take the model's own.") from None
    return Processor(directory, made, channels, _largest_side(made, directory / PROCESSOR))


def _largest_side(made: Any, path: Path) -> int:
    """Of the squares that a processor makes. Raises InputError for what no model takes, before memory is taken."""
    sides = [(name, side) for name in SIZES for side in _sides(getattr(made, name, None))]
    kept = getattr(made, "crop_pct", None)
    if isinstance(kept, int | float):
        if not KEPT <= kept <= 1:
            raise InputError(f"{path} has a crop_pct of {kept!r:.40}, not {KEPT} to 1; take the model's own.")
        sides += [(f"{name} for a crop_pct of {kept}", side / kept) for name, side in sides]
    for name, side in sides:
        if not side <= SIDE:
            raise InputError(f"{path} has a {name} of {side:.12g} pixels, more than {SIDE}; take the model's own.")
    return int(max((side for _, side in sides), default=0))


def _sides(found: Any) -> Iterator[float]:
    """The numbers in a size: one, some in a sequence, or by name, as in transformers 5's SizeDict."""
    if isinstance(found, int | float):
        yield found
    elif found is not None and not isinstance(found, str):
        by_name = found if isinstance(found, Mapping) else getattr(found, "__dict__", None)
        for one in found if by_name is None else by_name.values():
            yield from _sides(one)


def draw(found: Pictures, processor: Processor, nsamples: int, seed: int, *, augment: bool = False) -> Tensor:
    """Pixels, float32 [nsamples, C, H, W], of pictures drawn at random, none twice; augment: see `augmented`.

    Raises OptionError for fewer pictures than samples.
    """
    if nsamples > len(found):
        what = f"--nsamples {nsamples} is more than the {len(found)} pictures in {found.path}"
        raise OptionError(f"{what}; give at most so many, or more pictures.")
    rng = random.Random(seed)
    drawn = (found[number] for number in rng.sample(range(len(found)), nsamples))
    return torch.cat(list(processor.batches((augmented(one, rng) for one in drawn) if augment else drawn)))


def augmented(picture: "Image", rng: random.Random) -> "Image":
    """A random part of the picture at the picture's size, every other one mirrored (Szegedy et al. 2015)."""
    from PIL.Image import Resampling, Transpose

    width, height = picture.size
    area, ratio = width * height * rng.uniform(*AREA), rng.uniform(*RATIO)
    across = min(width, max(1, round((area * ratio) ** 0.5)))
    down = min(height, max(1, round((area / ratio) ** 0.5)))
    left, top = rng.randint(0, width - across), rng.randint(0, height - down)
    box = (left, top, left + across, top + down)
    if rng.random() < 0.5:
        picture = picture.transpose(Transpose.FLIP_LEFT_RIGHT)
    return picture.resize((width, height), Resampling.BICUBIC, box=box)


def classes_of(found: Pictures, config: Any) -> list[int]:
    """The model's class of each picture. Raises InputError where there is none, or one that the model does not have.

    Names of classes are looked up in the model's; where it knows none of them, they count in order.
    """
    labels, known = found.labels, int(config.num_labels)
    if labels is None:
        what = f"{found.path} does not say which class each picture is of"
        raise InputError(f"{what}; give a folder for each class, a column `label`, or `labels`.")
    if found.names is not None:
        labels = _by_name(found, labels, found.names, config)
    wrong = next((number for number, label in enumerate(labels) if not 0 <= label < known), None)
    if wrong is not None:
        what = f"picture {wrong} of {found.path} has the label {labels[wrong]}"
        raise InputError(f"{what}, outside the model's {known} classes (0 to {known - 1}); give its own data.")
    return list(labels)


def _by_name(found: Pictures, labels: Sequence[int], names: Sequence[str], config: Any) -> list[int]:
    theirs = {str(name): int(number) for number, name in config.id2label.items()}
    if all(name in theirs for name in names):
        return [theirs[names[label]] if label >= 0 else label for label in labels]
    if len(names) != int(config.num_labels):
        what = f"{found.path} has {len(names)} classes, such as {names[0]!r}, and the model {config.num_labels}"
        raise InputError(f"{what}, of other names; give a class for each, or call them as the model's id2label does.")
    return list(labels)
