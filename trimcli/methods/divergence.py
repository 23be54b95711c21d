"""How far predictions are from others."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimcli.methods.masks import slices

# So many logits at a time, on a CPU and elsewhere: a piece stays in a CPU's cache through all that is done with it,
# and an accelerator has enough to do.
PIECE, DEVICE_PIECE = 1 << 20, 1 << 27


def piece(device: torch.device) -> int:
    """How many logits are compared at a time."""
    return PIECE if device.type == "cpu" else DEVICE_PIECE


def divergence(sure: Tensor, given: Tensor) -> Tensor:
    """KL divergence of the predictions of logits `given` from those of `sure`, in nats: float32 [...].

    sure, given: logits [..., V] of any float dtype; gradients flow into `given` alone. What a model rules out, with
    logits of minus infinity, is no difference.
    """
    found: Tensor = _Divergence.apply(sure, given)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    """With its gradient as it is known, softmax(given) - softmax(sure), which is all that is kept until it is asked."""

    @staticmethod
    def forward(ctx: Any, sure: Tensor, given: Tensor) -> Tensor:
        found = torch.empty(given.shape[:-1], dtype=torch.float32, device=given.device)
        gap = torch.empty(given.shape, dtype=torch.float32, device=given.device) if ctx.needs_input_grad[1] else None
        vocabulary = given.shape[-1]
        pair = [logits.reshape(-1, vocabulary) for logits in (sure, given)]
        for rows in slices(len(pair[0]), max(1, piece(given.device) // vocabulary)):
            wanted, other = (logits[rows].float().log_softmax(dim=-1) for logits in pair)
            share = wanted.exp()
            if gap is not None:
                gap.view(-1, vocabulary)[rows] = other.exp().sub_(share)
            terms = share.mul_(wanted - other).masked_fill_(wanted.isneginf(), 0)
            found.view(-1)[rows] = terms.sum(dim=-1)
        ctx.save_for_backward(gap)
        ctx.dtype = given.dtype
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (gap,) = ctx.saved_tensors
        return None, gap.mul_(gradient[..., None]).to(ctx.dtype)
