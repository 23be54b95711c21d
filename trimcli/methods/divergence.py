"""How far predictions are from others."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def divergence(sure: Tensor, given: Tensor) -> Tensor:
    """KL divergence of the predictions of logits `given` from those of `sure`, in nats: float32 [...].

    sure, given: logits [..., V] of any float dtype; gradients flow into `given` alone. What a model rules out, with
    logits of minus infinity, is no difference.
    """
    found: Tensor = _Divergence.apply(sure, given)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    """With its gradient as it is known, softmax(given) - softmax(sure): fewer passes than autograd takes."""

    @staticmethod
    def forward(ctx: Any, sure: Tensor, given: Tensor) -> Tensor:
        wanted, found = (logits.float().log_softmax(dim=-1) for logits in (sure, given))
        ctx.save_for_backward(wanted, found)
        ctx.dtype = given.dtype
        return torch.where(wanted.isneginf(), 0.0, wanted.exp() * (wanted - found)).sum(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        wanted, found = ctx.saved_tensors
        return None, found.exp().sub_(wanted.exp()).mul_(gradient[..., None]).to(ctx.dtype)
