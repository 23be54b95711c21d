"""Perplexity layer by layer: a model larger than memory can be measured, masked or not."""

import math
from pathlib import Path

import torch
from torch import Tensor

from trimcli.console import NO_PROGRESS, Progress
from trimcli.files.masks import MaskFile
from trimcli.model.device import held_logits
from trimcli.model.skeleton import DecoderLayer, Skeleton
from trimcli.pipeline.estimate import Memory, measuring, own_share, state_bytes
from trimcli.pipeline.fit import Fit, Work, fit
from trimcli.pipeline.walk import Walk
from trimcli.world import current

# Hidden states of at most this many bytes are walked together; more windows take another round through the layers.
ROUND_BYTES = 4 << 30
# Fewer tokens' logits are never asked for at a time, or reading the head's weights would take longer than multiplying
# with them.
TOKENS = 256


def perplexity(
    skeleton: Skeleton,
    windows: Tensor,
    *,
    mask: MaskFile | None = None,
    batch_size: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> float:
    """Exp of the mean over windows, integer [n, seqlen], of the mean cross-entropy of their seqlen - 1 predictions.

    Every rank measures its share of the windows. mask: applied to each layer, and what is outside, as it is loaded.
    Raises InputError naming the layer whose outputs are not finite.
    """
    per_round = len(windows) if skeleton.spill is not None else windows_per_round(skeleton, windows.shape[1])
    losses = torch.zeros(len(windows), dtype=torch.float64, device=skeleton.device)
    mine = current().share(len(windows))
    for start in range(mine.start, mine.stop, per_round):
        rows = slice(start, min(start + per_round, mine.stop))
        with skeleton.covered(mask):
            losses[rows] = _round(skeleton, windows[rows], mask, batch_size, progress)
    mean = sum(current().whole(losses, 0).tolist()) / len(losses)
    return math.exp(mean) if mean < 700 else math.inf if not math.isnan(mean) else math.nan


def windows_per_round(skeleton: Skeleton, seqlen: int) -> int:
    """How many windows' hidden states are in memory together."""
    return max(1, ROUND_BYTES // state_bytes(skeleton, seqlen))


def logit_tokens(skeleton: Skeleton) -> int:
    """How many tokens' logits the device takes at a time."""
    vocabulary: int = skeleton.model.get_output_embeddings().weight.shape[0]
    return max(TOKENS, held_logits(skeleton.device) // vocabulary)


def keep_in_memory(
    skeleton: Skeleton,
    windows: int,
    seqlen: int,
    *,
    batch_size: int | None = None,
    spill: Path | None = None,
    otherwise: Path | None = None,
) -> Fit:
    """How the measurement of so many windows keeps to memory. spill, otherwise: of `Work`. Raises ResourceError."""
    mine = own_share(windows)
    together = mine if spill is not None else min(mine, windows_per_round(skeleton, seqlen))
    usual = min(logit_tokens(skeleton), together * seqlen)
    states = state_bytes(skeleton, together * seqlen)

    def memory(size: int, tokens: int | None) -> Memory:
        return measuring(skeleton, states=states, seqlen=seqlen, batch_size=size, logit_tokens=tokens or usual)

    pieces = list(dict.fromkeys([usual, *(count for count in (256, 128, 64, 32, 16) if count < usual)]))
    words = f"measuring perplexity of {skeleton.checkpoint.id}"
    return fit(skeleton, Work(words, memory, together, seqlen, batch_size, spill, otherwise, pieces))


def walked(
    skeleton: Skeleton, samples: Tensor, mask: MaskFile | None, batch_size: int | None, progress: Progress
) -> Walk:
    """A walk that has passed every layer, masks laid over its weights, with windows or pixels [n, ...]."""
    walk = Walk(skeleton, samples, batch_size=batch_size, progress=progress)
    with progress.task("evaluating layers", len(skeleton.layers)) as step:
        for layer in walk.layers():
            if mask is not None:
                apply_masks_to_layer(layer, mask)
            walk.advance(layer)
            step()
    return walk


def _round(
    skeleton: Skeleton, windows: Tensor, mask: MaskFile | None, batch_size: int | None, progress: Progress
) -> Tensor:
    """The mean cross-entropy of each window, float64 [n]."""
    walk = walked(skeleton, windows, mask, batch_size, progress)
    with walk.head() as head, progress.task("measuring windows", len(windows)) as step:
        length = windows.shape[1] - 1
        tokens = skeleton.logit_tokens or logit_tokens(skeleton)
        together, piece = max(1, tokens // length), min(length, tokens)
        targets = windows[:, 1:].to(skeleton.device, torch.long)
        total = torch.zeros(len(windows), dtype=torch.float64, device=skeleton.device)
        for start in range(0, len(windows), together):
            rows = slice(start, min(start + together, len(windows)))
            for first in range(0, length, piece):
                part = slice(first, min(first + piece, length))
                total[rows] += _losses(head(rows, part), targets[rows, part])
            step(rows.stop - rows.start)
    return total / length


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy per window: logits [b, l, vocabulary], targets int64 [b, l] -> float64 [b]."""
    logits = logits.float()
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return found.view(targets.shape).double().sum(dim=1)


def apply_masks(skeleton: Skeleton, mask: MaskFile) -> None:
    """Zero what the masks take from a whole model that is loaded."""
    matrices = skeleton.matrices(mask.names)
    for name in mask.names:
        if name in matrices:
            matrices[name].mask(mask.keep(name))


def apply_masks_to_layer(layer: DecoderLayer, mask: MaskFile) -> None:
    """Zero what the masks take from a loaded layer."""
    there = set(mask.names)
    for linear in layer.linears:
        if linear.name in there:
            linear.mask(mask.keep(linear.name))
