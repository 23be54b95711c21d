"""Rebuild the masks of one block: pruned weights that matter return, kept ones that do not go.

LLM-Barber (Su et al. 2024, "LLM-Barber: Block-Aware Rebuilder for Sparsity Mask in One-Shot for Large
Language Models", section 3). Pure functions of tensors: the gradients come from `trimcli.methods.blocks.structure`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimcli.errors import OptionError
from trimcli.methods.blocks.options import BarberOptions
from trimcli.options import Numerics

# Weights sorted at a time where rows or columns are independent: some 100 MB of sorted values and indices.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Rebuilt:
    """A block's new masks and weights, by linear.

    keep: bool [D_out, D_in]. weight: [D_out, D_in] in the dense weight's dtype, zero where not kept.
    swapped: number of weights that returned (in exact numerics as many left the unit).
    """

    keep: dict[str, Tensor]
    weight: dict[str, Tensor]
    swapped: dict[str, int]


def rebuild(
    dense: Mapping[str, Tensor],
    sparse: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor] | None,
    patterns: Mapping[str, tuple[int, int] | None],
    options: BarberOptions,
    numerics: Numerics = "exact",
) -> Rebuilt:
    """Pair pruned with kept weights of one block and swap the most rewarding pairs.

    dense: the dense model's weights, [D_out, D_in] by linear. sparse: the sparse model's, zero where pruned.
    keep: bool, the masks to rebuild. gradients: float32 mean squared gradients (`blocks.block_gradients`)
    in the weights' orientation; None is enough for metric `W`. patterns: (kept, group) of the linears whose mask is
    N:M, whose groups keep their counts. numerics: `exact` swaps pairs, so counts stay; `reference` compares with two
    threshold values, as published.

    In every unit, pruned weights by descending metric meet kept ones by ascending metric; of the pairs in
    which the pruned weight is worth more, the first int(count * threshold) swap. Equal metrics go in index
    order. Su et al. 2024, section 3.3.

    Raises OptionError if the metric needs gradients and none are given, or D_in is not made of whole groups.
    """
    if gradients is None and options.needs_gradients:
        raise OptionError(f"--prune-metric {options.metric} needs gradients; only W does without.")

    def base_of(name: str) -> Tensor:
        if not options.retain_reconstruction:
            return dense[name]
        return torch.where(keep[name], sparse[name].to(dense[name].dtype), dense[name])

    def metric_of(name: str) -> Tensor:
        if gradients is None or options.metric == "W":
            return base_of(name).float().abs()
        root = gradients[name].float().sqrt()
        return root if options.metric == "D" else root.mul_(base_of(name).float().abs())

    new: dict[str, Tensor] = {}
    free = {}
    for name, old in keep.items():
        pattern = patterns.get(name)
        if pattern is None:
            free[name] = old
        else:
            new[name] = _swap_in_groups(metric_of(name), old, pattern, options.threshold, numerics)
    if options.granularity == "block" and free:
        new |= _swap_together({name: metric_of(name) for name in free}, free, options.threshold, numerics)
        free = {}
    for name, old in free.items():
        if options.granularity == "layer":
            new |= _swap_together({name: metric_of(name)}, {name: old}, options.threshold, numerics)
        elif options.granularity == "output1":
            new[name] = _swap_in_rows(metric_of(name), old, options.threshold, numerics)
        else:
            new[name] = _swap_in_rows(metric_of(name).T, old.T, options.threshold, numerics).T.contiguous()
    return Rebuilt(
        keep=new,
        weight={name: base_of(name).masked_fill(~new[name], 0) for name in new},
        swapped={name: int((new[name] & ~keep[name]).sum()) for name in new},
    )


def _row_chunks(metric: Tensor, keep: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, _CHUNK // max(1, metric.shape[1]))
    return zip(metric.split(rows), keep.split(rows), strict=True)


@dataclass(frozen=True)
class _Pairing:
    """Every row's sorted sides; entries beyond a side's size are infinite and pair with nothing.

    growth, prune: sorted metrics [rows, D_in], by growth_order and prune_order. count: how many pairs of
    each row swap, [rows, 1].
    """

    growth: Tensor
    growth_order: Tensor
    prune: Tensor
    prune_order: Tensor
    count: Tensor


def _pair_rows(metric: Tensor, keep: Tensor, threshold: float) -> _Pairing:
    growth, growth_order = metric.masked_fill(keep, -torch.inf).sort(dim=1, descending=True, stable=True)
    prune, prune_order = metric.masked_fill(~keep, torch.inf).sort(dim=1, stable=True)
    rewarding = (growth > prune).sum(dim=1, keepdim=True)
    return _Pairing(growth, growth_order, prune, prune_order, (rewarding.double() * threshold).long())


def _first(order: Tensor, count: Tensor) -> Tensor:
    """Bool like `order`: True at each row's first `count` indices in `order`."""
    chosen = torch.arange(order.shape[1], device=order.device) < count
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def _growing(pairs: _Pairing, metric: Tensor, keep: Tensor, numerics: Numerics) -> Tensor:
    """Which pruned weights return, before anything goes."""
    if numerics == "exact":
        return _first(pairs.growth_order, pairs.count)
    last = ((~keep).sum(dim=1, keepdim=True) - 1).clamp(min=0)
    return ~keep & (metric > pairs.growth.gather(1, pairs.count.minimum(last)))


def _swap_in_rows(metric: Tensor, keep: Tensor, threshold: float, numerics: Numerics) -> Tensor:
    parts = []
    for worth, old in _row_chunks(metric, keep):
        pairs = _pair_rows(worth, old, threshold)
        returns = _growing(pairs, worth, old, numerics)
        if numerics == "exact":
            goes = _first(pairs.prune_order, pairs.count)
        else:
            last = (old.sum(dim=1, keepdim=True) - 1).clamp(min=0)
            goes = old & (worth < pairs.prune.gather(1, pairs.count.minimum(last)))
        parts.append((old & ~goes) | returns)
    return torch.cat(parts)


def _swap_in_groups(
    metric: Tensor, keep: Tensor, pattern: tuple[int, int], threshold: float, numerics: Numerics
) -> Tensor:
    kept, group = pattern
    if metric.shape[1] % group:
        inputs = metric.shape[1]
        raise OptionError(f"{kept}:{group} needs whole groups, and {inputs} inputs are no multiple of {group}.")
    parts = []
    for worth, old in _row_chunks(metric, keep):
        pairs = _pair_rows(worth, old, threshold)
        returns = _growing(pairs, worth, old, numerics).reshape(-1, group)
        worth, old = worth.reshape(-1, group), old.reshape(-1, group)
        # A group of which little is kept (1:4) cannot take back more than it can give.
        room = returns.sum(dim=1, keepdim=True).minimum(old.sum(dim=1, keepdim=True))
        growth_order = worth.masked_fill(~returns, -torch.inf).argsort(dim=1, descending=True, stable=True)
        prune_order = worth.masked_fill(~old, torch.inf).argsort(dim=1, stable=True)
        parts.append((old & ~_first(prune_order, room)) | _first(growth_order, room))
    return torch.cat(parts).view(keep.shape)


def _swap_together(
    metrics: dict[str, Tensor], keep: Mapping[str, Tensor], threshold: float, numerics: Numerics
) -> dict[str, Tensor]:
    """One unit of one or more whole matrices.

    Only sorted values are held, no order of all the weights: ties at the thresholds are taken by index later.
    """
    growth = _sorted([metric[~keep[name]] for name, metric in metrics.items()], descending=True)
    prune = _sorted([metric[keep[name]] for name, metric in metrics.items()], descending=False)
    pairs = min(len(growth), len(prune))
    count = int(int((growth[:pairs] > prune[:pairs]).sum()) * threshold)
    if count == 0:
        return {name: keep[name].clone() for name in metrics}
    if numerics == "reference":
        grow_above = growth[min(count, len(growth) - 1)]
        prune_below = prune[min(count, len(prune) - 1)]
        return {
            name: (keep[name] & (metric >= prune_below)) | (~keep[name] & (metric > grow_above))
            for name, metric in metrics.items()
        }
    grow_from, prune_to = growth[count - 1], prune[count - 1]
    grow_ties = count - int((growth > grow_from).sum())
    prune_ties = count - int((prune < prune_to).sum())
    new = {}
    for name, metric in metrics.items():
        old = keep[name]
        level = _leading(~old & (metric == grow_from), grow_ties)
        grow_ties -= int(level.sum())
        returns = (~old & (metric > grow_from)) | level
        level = _leading(old & (metric == prune_to), prune_ties)
        prune_ties -= int(level.sum())
        goes = (old & (metric < prune_to)) | level
        new[name] = (old & ~goes) | returns
    return new


def _sorted(parts: list[Tensor], *, descending: bool) -> Tensor:
    return torch.cat(parts).sort(descending=descending).values


def _leading(chosen: Tensor, count: int) -> Tensor:
    """The first `count` True entries of `chosen`, in row-major order."""
    first = torch.zeros(chosen.numel(), dtype=torch.bool, device=chosen.device)
    first[chosen.reshape(-1).nonzero()[:count, 0]] = True
    return first.view(chosen.shape)
