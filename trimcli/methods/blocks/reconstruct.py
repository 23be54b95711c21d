"""Reconstruction: a pruned decoder layer's surviving weights follow the dense layer's outputs (EBFT, Guo et al. 2024).

Nothing is trained end to end: one layer at a time learns, by a few steps of Adam, to give on the pruned model's hidden
states what the dense layer gives on the dense model's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trimcli.methods.divergence import divergence
from trimcli.methods.masks import slices

BETAS = (0.9, 0.95)
# What the loss is multiplied by where gradients pass in float16, in which many would be nothing; Adam does not mind.
HALF_SCALE = 1024.0

Error = Callable[[Tensor, Tensor], Tensor]


def relative_error(found: Tensor, target: Tensor) -> Tensor:
    """Squared error of hidden states [b, L, H] relative to the target's square norm, the tokens' mean.

    Token by token: a few carry activations a thousand times larger, and else they were all that is fitted.
    """
    found, target = found.float(), target.float()
    gaps = (found - target).square().sum(dim=-1) / target.square().sum(dim=-1).clamp(min=1e-12)
    return gaps.mean()


def prediction_error(logits: Callable[[Tensor], Tensor], tokens: int) -> Error:
    """The error of the last layer: what the hidden states predict, against what the target does, in nats a token.

    logits: [b, l, V] from hidden states [b, l, H], asked for at most `tokens` at a time.
    """

    def error(found: Tensor, target: Tensor) -> Tensor:
        learns = found.requires_grad
        held, wanted = found.detach().requires_grad_(learns), target.to(found.dtype)
        total = torch.zeros((), device=held.device)
        samples, length = held.shape[:2]
        for rows in slices(samples, max(1, tokens // length)):
            for part in slices(length, tokens):
                one = divergence(logits(wanted[rows, part]), logits(held[rows, part])).sum()
                if learns:  # at once, so that no more logits are held than these
                    one.backward()
                total += one.detach()
        if held.grad is not None:
            total = total + ((found - found.detach()) * held.grad).sum()
        return total / (samples * length)

    return error


@dataclass(frozen=True)
class Batch:
    """What a layer is called with for some samples, and the hidden states [b, L, H] that the dense layer gives.

    error: how far the layer's hidden states are from those, a scalar.
    """

    call: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    target: Callable[[], Tensor]
    error: Error = relative_error


@dataclass(frozen=True)
class Reconstructed:
    """Float32 values of the parameters, zero where masked; the error on held-out batches before and after."""

    values: dict[str, Tensor]
    before: float
    after: float


def reconstruct(
    layer: nn.Module,
    keep: Mapping[str, Tensor | None],
    training: Sequence[Batch],
    heldout: Sequence[Batch],
    *,
    steps: int,
    lr: float,
    advance: Callable[[], object] = lambda: None,
) -> Reconstructed:
    """Fit the parameters `keep` names, as the layer holds them; those of a mask, of its parameter's shape, stay zero.

    steps: of Adam, one batch each, with learning rates that fall linearly to nothing. lr: the first, as a part of each
    parameter's root mean square, so that one value does for models whose weights differ in size. The values are those
    of least error on `heldout` at any quarter of the steps, the first ones included: never worse than at the start.
    """
    with torch.inference_mode(False), torch.enable_grad():
        masters = {name: _masked(layer.get_parameter(name).detach().float().clone(), keep[name]) for name in keep}
        masters = {name: one.requires_grad_() for name, one in masters.items()}
        dtypes = {name: layer.get_parameter(name).dtype for name in keep}

        def values() -> dict[str, Tensor]:
            return {name: one.to(dtypes[name]) for name, one in masters.items()}

        scale = HALF_SCALE if torch.float16 in dtypes.values() else 1.0
        groups = [
            {"params": [one], "lr": rate} for one, rate in zip(masters.values(), _rates(masters, lr), strict=True)
        ]
        optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        best, before = (
            {name: one.detach().clone() for name, one in masters.items()},
            mean_error(layer, values(), heldout),
        )
        least, order, asked = before, shuffled(training), looks(steps)
        for step in range(1, steps + 1):
            optimizer.zero_grad(set_to_none=True)
            (layer_error(layer, values(), next(order)) * scale).backward()
            for name, one in masters.items():
                if one.grad is not None:  # an expert that no token of this batch was sent to has none
                    _masked(one.grad, keep[name])
            optimizer.step()
            falling.step()
            advance()
            if step in asked and (error := mean_error(layer, values(), heldout)) < least:
                least, best = error, {name: one.detach().clone() for name, one in masters.items()}
    return Reconstructed(best, before, least)


def looks(steps: int) -> set[int]:
    """After which steps held-out batches are asked: every quarter of them, the last one always."""
    return {-(-steps * quarter // 4) for quarter in (1, 2, 3, 4)}


def _rates(masters: Mapping[str, Tensor], lr: float) -> list[float]:
    """Each parameter's first learning rate, by what of it is not zero; a bias of zeros learns like a typical one."""
    kept = [one.detach().square().sum() / one.count_nonzero().clamp(min=1) for one in masters.values()]
    sizes = torch.stack(kept).sqrt().tolist()
    typical = sum(sizes) / len(sizes)
    return [lr * (size or typical) for size in sizes]


def shuffled(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches in random order, the same in every run, again and again."""
    order = torch.Generator().manual_seed(0)
    while True:
        for place in reversed(torch.randperm(len(batches), generator=order).tolist()):
            yield batches[place]


def layer_error(layer: nn.Module, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """The layer's error on a batch, a scalar with its graph; values: parameters to take in place of its own."""
    args, kwargs = batch.call()
    result = functional_call(layer, dict(values), args, kwargs)
    return batch.error(result[0] if isinstance(result, tuple | list) else result, batch.target())


def mean_error(layer: nn.Module, values: Mapping[str, Tensor], batches: Sequence[Batch]) -> float:
    """The mean error over batches; an accelerator is waited for once."""
    with torch.no_grad():
        return float(torch.stack([layer_error(layer, values, batch) for batch in batches]).mean())


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """The same tensor, zero where the mask is; what Adam has no gradient of from the start, it leaves as it is."""
    return values if mask is None else values.mul_(mask)
