"""Learned masks: which weights of a decoder layer stay is learned by gradient, and the weights keep their values.

The loss is that of `reconstruct`: the layer's output on the pruned model's hidden states against the dense layer's on
the dense model's. Each weight has a score, and at every step the highest stay, under the counts that the mask had from
the start. The gradient of the loss by the masked weight, times the weight, is the gradient by its place in the mask; it
goes straight through the selection into the score (Bengio et al. 2013), of pruned weights as of kept ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trimcli.methods import masks
from trimcli.methods.blocks.reconstruct import Batch, layer_error, looks, mean_error, shuffled

Counts = Literal["row", "matrix"] | int

MOMENTUM = 0.9


@dataclass(frozen=True)
class Learnable:
    """A matrix [D_out, D_in] whose mask is learned: its dense weight, and the mask that is there, bool.

    parameter: what it lies in, inside the layer. view: the matrix in a tensor like that parameter's. importance:
    float32 [D_out, D_in], not negative; what is near its row's threshold changes first. counts: where the number of
    weights that go is held: in every row, in the whole matrix, or in every so many consecutive inputs.
    """

    parameter: str
    view: Callable[[Tensor], Tensor]
    weight: Tensor
    keep: Tensor
    importance: Tensor
    counts: Counts = "row"


@dataclass(frozen=True)
class Learned:
    """The masks, bool [D_out, D_in], in the matrices' order; the error on held-out batches before and after."""

    keep: list[Tensor]
    before: float
    after: float


def learn_masks(
    layer: nn.Module,
    matrices: Sequence[Learnable],
    training: Sequence[Batch],
    heldout: Sequence[Batch],
    *,
    steps: int,
    lr: float,
    advance: Callable[[], object] = lambda: None,
) -> Learned:
    """Learn the masks of `matrices`, and leave the layer as it is.

    steps: one batch each. lr: how far a score of a matrix moves in one step, root mean square, at first, as a natural
    logarithm of the importance; it falls linearly to nothing. The masks are those of least error on `heldout` at any
    quarter of the steps, the first ones included: never worse than at the start.
    """
    with torch.inference_mode(False), torch.enable_grad():
        learned = [_Scores(one) for one in matrices]

        def under(keep: Sequence[Tensor]) -> dict[str, Tensor]:
            values = {one.parameter: layer.get_parameter(one.parameter).detach().clone() for one in matrices}
            for one, mask in zip(matrices, keep, strict=True):
                one.view(values[one.parameter]).copy_(one.weight * mask)
            return values

        keep = best = [one.keep for one in matrices]
        before = least = mean_error(layer, under(keep), heldout)
        order, asked = shuffled(training), looks(steps)
        for step in range(1, steps + 1):
            values = under(keep)
            leaves = [one.requires_grad_() for one in values.values()]
            found = torch.autograd.grad(layer_error(layer, values, next(order)), leaves, allow_unused=True)
            gradients = dict(zip(values, found, strict=True))
            for one in learned:
                gradient = gradients[one.of.parameter]
                if gradient is not None:  # an expert that no token of this batch was sent to has none
                    one.move(gradient, lr * (1 - (step - 1) / steps))
            keep = [one.select() for one in learned]
            advance()
            if step in asked and (error := mean_error(layer, under(keep), heldout)) < least:
                least, best = error, keep
    return Learned(best, before, least)


class _Scores:
    """The scores of one matrix, float32, in rows under one count each: 0 is where the first mask's threshold was."""

    def __init__(self, of: Learnable) -> None:
        self.of = of
        self._width = of.counts if isinstance(of.counts, int) else of.keep.shape[1]
        keep = of.keep.reshape(-1, self._width)
        self._counts = (~keep).sum(dim=1)
        self._total = int(self._counts.sum())
        tiny = torch.finfo(torch.float32).tiny
        worth = of.importance.reshape(-1, self._width).clamp(min=tiny).log()
        # Between the weights that go and those that stay; rows that lose all or nothing have one side alone.
        gone = worth.masked_fill(keep, -torch.inf).amax(dim=1, keepdim=True)
        stays = worth.masked_fill(~keep, torch.inf).amin(dim=1, keepdim=True)
        threshold = (torch.where(gone.isinf(), stays, gone) + torch.where(stays.isinf(), gone, stays)) / 2
        # Another score may have chosen the mask: its side of the threshold counts.
        margin = (worth - threshold).abs().clamp(min=1e-6)
        self._scores = torch.where(keep, margin, -margin)
        self._momentum = torch.zeros_like(self._scores)

    def move(self, gradient: Tensor, rate: float) -> None:
        """Take in a gradient by the masked parameter."""
        towards = (self.of.view(gradient).float() * self.of.weight).reshape(self._scores.shape)
        self._momentum.lerp_(towards, 1 - MOMENTUM)
        norm = self._momentum.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        self._scores.sub_(self._momentum * (rate / norm))

    def select(self) -> Tensor:
        """The mask, bool [D_out, D_in]: the highest scores stay."""
        if self.of.counts == "matrix":
            keep = masks.lowest_in_all(self._scores, self._total)
        else:
            keep = masks.lowest_per_row(self._scores, self._counts, check=False)
        return keep.reshape(self.of.keep.shape)
