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

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Batch:
    """What a layer is called with for some samples, and the hidden states [b, L, H] that the dense layer gives."""

    call: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    target: Callable[[], Tensor]


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
        masters = {name: layer.get_parameter(name).detach().float().clone().requires_grad_() for name in keep}
        dtypes = {name: layer.get_parameter(name).dtype for name in keep}

        def values() -> dict[str, Tensor]:
            return {name: _under(one, keep[name]).to(dtypes[name]) for name, one in masters.items()}

        groups = [
            {"params": [one], "lr": rate} for one, rate in zip(masters.values(), _rates(masters, lr), strict=True)
        ]
        optimizer = torch.optim.Adam(groups, betas=BETAS)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        best, before = (
            {name: one.detach().clone() for name, one in masters.items()},
            mean_error(layer, values(), heldout),
        )
        least, order = before, shuffled(training)
        for step in range(1, steps + 1):
            optimizer.zero_grad(set_to_none=True)
            layer_error(layer, values(), next(order)).backward()
            optimizer.step()
            falling.step()
            advance()
            if step % max(1, steps // 4) == 0 and (error := mean_error(layer, values(), heldout)) < least:
                least, best = error, {name: one.detach().clone() for name, one in masters.items()}
    with torch.no_grad():
        final = {name: _under(one, keep[name]) for name, one in best.items()}
    return Reconstructed(final, before, least)


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
    return _error(result[0] if isinstance(result, tuple | list) else result, batch.target())


def mean_error(layer: nn.Module, values: Mapping[str, Tensor], batches: Sequence[Batch]) -> float:
    """The mean error over batches; an accelerator is waited for once."""
    with torch.no_grad():
        return float(torch.stack([layer_error(layer, values, batch) for batch in batches]).mean())


def _under(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values * mask


def _error(found: Tensor, target: Tensor) -> Tensor:
    """Squared error relative to the target's square norm, token by token: else few tokens were all that is fitted."""
    found, target = found.float(), target.float()
    gaps = (found - target).square().sum(dim=-1) / target.square().sum(dim=-1).clamp(min=1e-12)
    return gaps.mean()
