"""Rebuild the masks of one block: pruned weights that matter return, kept ones that do not go.

LLM-Barber (Su et al. 2024, section 3). The gradients come from `trimcli.methods.blocks.structure`.
"""

from collections.abc import Mapping
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

    By linear, [D_out, D_in]: dense, sparse: weights, the sparse zero where pruned. keep: bool, the masks to rebuild.
    gradients: float32 mean squared gradients; None is enough for metric `W`. patterns: (kept, group) of the linears
    whose mask is N:M, whose groups keep their counts. numerics: `exact` swaps pairs, so counts stay; `reference`
    compares with two threshold values, as published.

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
    free = [name for name in keep if patterns.get(name) is None]
    for name in keep:
        if (pattern := patterns.get(name)) is not None:
            new[name] = _swap_in_rows(metric_of(name), keep[name], options.threshold, numerics, pattern)
    if options.granularity in ("block", "layer"):
        for unit in [free] if options.granularity == "block" and free else [[name] for name in free]:
            metrics = {name: metric_of(name) for name in unit}
            new |= _swap_together(metrics, keep, options.threshold, numerics)
    elif options.granularity == "output1":
        new |= {name: _swap_in_rows(metric_of(name), keep[name], options.threshold, numerics) for name in free}
    else:
        for name in free:
            columns = _swap_in_rows(metric_of(name).T, keep[name].T, options.threshold, numerics)
            new[name] = columns.T.contiguous()
    return Rebuilt(
        keep=new,
        weight={name: base_of(name).masked_fill(~new[name], 0) for name in new},
        swapped={name: int((new[name] & ~keep[name]).sum()) for name in new},
    )


def _first(order: Tensor, count: Tensor) -> Tensor:
    """Bool like `order`: True at each row's first `count` indices in `order`."""
    chosen = torch.arange(order.shape[1], device=order.device) < count
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def _swap_in_rows(
    metric: Tensor, keep: Tensor, threshold: float, numerics: Numerics, pattern: tuple[int, int] | None = None
) -> Tensor:
    """Every row a unit; with a pattern, what returns makes room in its own group."""
    if pattern and metric.shape[1] % pattern[1]:
        kept, group = pattern
        inputs = metric.shape[1]
        raise OptionError(f"{kept}:{group} needs whole groups, and {inputs} inputs are no multiple of {group}.")
    parts = []
    rows = max(1, _CHUNK // max(1, metric.shape[1]))
    for worth, old in zip(metric.split(rows), keep.split(rows), strict=True):
        # Entries beyond a side's size are infinite and pair with nothing.
        growth, growth_order = worth.masked_fill(old, -torch.inf).sort(dim=1, descending=True, stable=True)
        prune, prune_order = worth.masked_fill(~old, torch.inf).sort(dim=1, stable=True)
        count = ((growth > prune).sum(dim=1, keepdim=True).double() * threshold).long()
        if numerics == "exact":
            returns, goes = _first(growth_order, count), _first(prune_order, count)
        else:
            kept_count = old.sum(dim=1, keepdim=True)
            last_gone, last_kept = ((n - 1).clamp(min=0) for n in (old.shape[1] - kept_count, kept_count))
            returns = ~old & (worth > growth.gather(1, count.minimum(last_gone)))
            goes = old & (worth < prune.gather(1, count.minimum(last_kept)))
        if pattern:
            returns, worth, old = (part.reshape(-1, pattern[1]) for part in (returns, worth, old))
            # A group of which little is kept (1:4) cannot take back more than it can give.
            room = returns.sum(dim=1, keepdim=True).minimum(old.sum(dim=1, keepdim=True))
            order = worth.masked_fill(~returns, -torch.inf).argsort(dim=1, descending=True, stable=True)
            returns = _first(order, room)
            goes = _first(worth.masked_fill(~old, torch.inf).argsort(dim=1, stable=True), room)
        parts.append((old & ~goes) | returns)
    return torch.cat(parts).view(keep.shape)


def _swap_together(
    metrics: dict[str, Tensor], keep: Mapping[str, Tensor], threshold: float, numerics: Numerics
) -> dict[str, Tensor]:
    """One unit of whole matrices. Only sorted values are held: ties at the thresholds are taken by index later."""
    growth = torch.cat([metric[~keep[name]] for name, metric in metrics.items()]).sort(descending=True).values
    prune = torch.cat([metric[keep[name]] for name, metric in metrics.items()]).sort().values
    pairs = min(len(growth), len(prune))
    count = int(int((growth[:pairs] > prune[:pairs]).sum()) * threshold)
    if count == 0:
        return {name: keep[name].clone() for name in metrics}
    if numerics == "reference":
        grow_above, prune_below = (side[min(count, len(side) - 1)] for side in (growth, prune))
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


def _leading(chosen: Tensor, count: int) -> Tensor:
    """The first `count` True entries of `chosen`, in row-major order."""
    first = torch.zeros(chosen.numel(), dtype=torch.bool, device=chosen.device)
    first[chosen.reshape(-1).nonzero()[:count, 0]] = True
    return first.view(chosen.shape)
