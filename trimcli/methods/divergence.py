"""How far predictions are from others."""

import torch
from torch import Tensor


def divergence(sure: Tensor, given: Tensor) -> Tensor:
    """KL divergence of the predictions of logits `given` from those of `sure`, in nats: float32 [...].

    sure, given: logits [..., V] of any float dtype; gradients flow into `given` as into `sure`. What a model rules out,
    with logits of minus infinity, is no difference.
    """
    wanted, found = (logits.float().log_softmax(dim=-1) for logits in (sure, given))
    return torch.where(wanted.isneginf(), 0.0, wanted.exp() * (wanted - found)).sum(dim=-1)
