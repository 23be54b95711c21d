"""Accuracy of an image classifier, layer by layer, masked or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trimcli.console import NO_PROGRESS, Progress
from trimcli.evaluation.perplexity import ROUND_BYTES, walked
from trimcli.files.masks import MaskFile
from trimcli.images.pixels import Processor
from trimcli.images.sources import Pictures
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline.estimate import Memory, own_share, state_bytes, walking
from trimcli.pipeline.fit import Fit, Work, fit
from trimcli.pipeline.walk import usual_length
from trimcli.world import current

BEST = 5
"""How many of the likeliest classes count as found by the second figure."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of the pictures: whose class is the likeliest (top1), or one of the five likeliest (top5)."""

    top1: float
    top5: float
    images: int


def accuracy(
    skeleton: Skeleton,
    found: Pictures,
    classes: Sequence[int],
    processor: Processor,
    *,
    mask: MaskFile | None = None,
    batch_size: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Accuracy:
    """Measure the pictures whose `classes` are given. Every rank measures its share, in rounds through the layers.

    mask: applied to each layer, and what is outside, as it is loaded. The skeleton is proven. Raises InputError naming
    a picture that cannot be decoded, or the layer whose outputs are not finite.
    """
    per_round = pictures_per_round(skeleton)
    right = torch.zeros(2, dtype=torch.int64, device=skeleton.device)
    mine = current().share(len(found))
    for start in range(mine.start, mine.stop, per_round):
        numbers = range(start, min(start + per_round, mine.stop))
        pixels = torch.cat(list(processor.batches(found[number] for number in numbers)))
        wanted = torch.tensor([classes[number] for number in numbers], device=skeleton.device)
        with skeleton.covered(mask):
            right += _round(skeleton, pixels, wanted, mask, batch_size, progress)
    top1, top5 = (int(count) / len(found) for count in current().summed(right))
    return Accuracy(top1, top5, len(found))


def pictures_per_round(skeleton: Skeleton) -> int:
    """How many pictures walk together."""
    return max(1, ROUND_BYTES // state_bytes(skeleton, usual_length(skeleton)))


def keep_pictures_in_memory(
    skeleton: Skeleton,
    count: int,
    *,
    batch_size: int | None = None,
    spill: Path | None = None,
    otherwise: Path | None = None,
) -> Fit:
    """How the measurement of so many pictures keeps to memory. spill, otherwise: of `Work`. Raises ResourceError."""
    together, places = min(own_share(count), pictures_per_round(skeleton)), usual_length(skeleton)

    def memory(size: int, _: int | None) -> Memory:
        return walking(skeleton, (), nsamples=together, seqlen=places, batch_size=size)

    words = f"measuring accuracy of {skeleton.checkpoint.id}"
    return fit(skeleton, Work(words, memory, together, places, batch_size, spill, otherwise))


def _round(
    skeleton: Skeleton,
    pixels: Tensor,
    wanted: Tensor,
    mask: MaskFile | None,
    batch_size: int | None,
    progress: Progress,
) -> Tensor:
    """How many pictures are right by the likeliest class, and by the five likeliest, int64 [2]. wanted: int64 [n]."""
    walk = walked(skeleton, pixels, mask, batch_size, progress)
    right = torch.zeros(2, dtype=torch.int64, device=skeleton.device)
    with walk.head() as head, progress.task("measuring pictures", len(pixels)) as step:
        for start in range(0, len(pixels), walk.batch_size):
            rows = slice(start, min(start + walk.batch_size, len(pixels)))
            logits = head(rows, slice(None))
            likeliest = logits.topk(min(BEST, logits.shape[1]), dim=1).indices == wanted[rows, None]
            right += torch.stack([likeliest[:, 0].sum(), likeliest.any(dim=1).sum()])
            step(rows.stop - rows.start)
    return right
