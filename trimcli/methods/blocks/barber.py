"""LLM-Barber: pruned weights of a block that matter return, kept ones that do not go (Su et al. 2024, section 3)."""

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
    """A block's new masks, weights (zero where not kept) and how many returned, by linear."""

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
    """Pair pruned with kept weights of one block and swap the most rewarding pairs (Su et al. 2024, section 3.3).

    By linear, [D_out, D_in]: dense, sparse: weights, the sparse zero where pruned. keep: bool, the masks to rebuild.
    gradients: float32 mean squared gradients; None is enough for metric `W`. patterns: (kept, group) where the mask is
    N:M, whose groups keep their counts. In every unit, pruned weights by descending metric meet kept ones by ascending
    metric, equal ones in index order; of the pairs in which the pruned weight is worth more, the first int(count *
    threshold) swap. `reference` numerics compare with two threshold values instead, as published, so counts may change.
    Raises OptionError if gradients are needed and not given, or D_in is not made of whole groups.
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
    for name in keep:
        if (pattern := patterns.get(name)) is not None or options.granularity == "output1":
            new[name] = _swap_in_rows(metric_of(name), keep[name], options.threshold, numerics, pattern)
        elif options.granularity == "input1":
            columns = _swap_in_rows(metric_of(name).T, keep[name].T, options.threshold, numerics)
            new[name] = columns.T.contiguous()
    rest = [name for name in keep if name not in new]
    for unit in [rest] if options.granularity == "block" and rest else [[name] for name in rest]:
        new |= _swap_together({name: metric_of(name) for name in unit}, keep, options.threshold, numerics)
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
    if pattern and (inputs := metric.shape[1]) % (group := pattern[1]):
        raise OptionError(f"{pattern[0]}:{group} needs whole groups, and {inputs} inputs are no multiple of {group}.")
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
        back = _leading(~old & (metric == grow_from), grow_ties)
        gone = _leading(old & (metric == prune_to), prune_ties)
        grow_ties -= int(back.sum())
        prune_ties -= int(gone.sum())
        new[name] = (old & ~(metric < prune_to) & ~gone) | (~old & (metric > grow_from)) | back
    return new


def _leading(chosen: Tensor, count: int) -> Tensor:
    """The first `count` True entries of `chosen`, in row-major order."""
    first = torch.zeros(chosen.numel(), dtype=torch.bool, device=chosen.device)
    first[chosen.reshape(-1).nonzero()[:count, 0]] = True
    return first.view(chosen.shape)
