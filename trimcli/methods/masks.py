"""Masks: how many weights go, which ones, and how a mask is stored.

A keep mask is bool [D_out, D_in], True where the weight stays; scores are float [D_out, D_in], counts of the weights
that go int64 [D_out], each in 0..D_in. The lowest scores go first, equal ones in index order. `check`: refuse NaN
scores (ValueError), for which the host waits for an accelerator once; without, NaN gives some mask.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trimcli.options import Numerics

_BLOCK = 1 << 22


def matrix_budget(d_out: int, d_in: int, sparsity: float) -> int:
    """Weights that a matrix [d_out, d_in] loses: round(sparsity * d_out * d_in), within 0..d_out * d_in."""
    return min(max(round(sparsity * d_out * d_in), 0), d_out * d_in)


def even_row_counts(
    d_out: int, d_in: int, sparsity: float, numerics: Numerics, device: torch.device | None = None
) -> Tensor:
    """Weights to go from each row when all rows share one sparsity, int64 [d_out] on `device`.

    exact: the rows share the matrix budget, the lower ones take one more where it does not divide evenly. reference:
    floor(d_in * sparsity) each, as the published Wanda counts (Sun et al. 2023).
    """
    if numerics == "reference":
        return torch.full((d_out,), min(max(int(d_in * sparsity), 0), d_in), device=device)
    each, extra = divmod(matrix_budget(d_out, d_in, sparsity), d_out)
    counts = torch.full((d_out,), each, device=device)
    counts[:extra] += 1
    return counts


def round_row_counts(row_sparsity: Tensor, d_in: int, total: int) -> Tensor:
    """Largest-remainder rounding of row_sparsity [D_out] * d_in to counts that sum to `total`. Raises ValueError."""
    if not 0 <= total <= row_sparsity.numel() * d_in:
        raise ValueError(f"{row_sparsity.numel()} rows of {d_in} weights cannot lose {total} weights.")
    if not row_sparsity.isfinite().all():
        raise ValueError("a row sparsity is not finite.")
    ideal = (row_sparsity.double() * d_in).clamp_(0, d_in)
    counts = ideal.floor().long()
    while missing := total - int(counts.sum()):
        step = 1 if missing > 0 else -1
        lack = (ideal - counts) * step
        lack[counts == (d_in if step > 0 else 0)] = -torch.inf
        order = lack.argsort(descending=True, stable=True) if step > 0 else lack.argsort(stable=True).flip(0)
        movable = int(lack.isfinite().sum())
        counts[order[: min(abs(missing), movable)]] += step
    return counts


def keep_from_ranks(ranks: Tensor, counts: Tensor) -> Tensor:
    """Keep mask without the counts[k] lowest of every row k. ranks: [D_out, D_in] from `ranking.ranks_of`."""
    return ranks >= counts.to(ranks.device, ranks.dtype).unsqueeze(1)


def lowest_per_row(scores: Tensor, counts: Tensor, *, check: bool = True) -> Tensor:
    """Keep mask without the counts[k] lowest scores of every row k."""
    if check:
        refuse_nan(scores)
    counts = counts.to(scores.device, torch.int64)
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for rows in _row_blocks(scores):
        thresholds = row_thresholds(sort_rows(scores[rows]), counts[rows])
        keep[rows] = split_rows(scores[rows], thresholds, counts[rows])
    return keep


def lowest_overall(scores: Tensor, sparsity: float, numerics: Numerics, *, check: bool = True) -> Tensor:
    """Keep mask without the round(sparsity * D_out * D_in) lowest scores of the whole matrix.

    reference: without all <= the value at ascending index int(D_out * D_in * sparsity), as in Wanda's published code.
    """
    if check:
        refuse_nan(scores)
    if numerics == "reference":
        index = min(max(int(scores.numel() * sparsity), 0), scores.numel() - 1)
        return scores > _kth_lowest(scores, index + 1)
    return lowest_in_all(scores, matrix_budget(scores.shape[0], scores.shape[1], sparsity))


def lowest_in_all(scores: Tensor, total: int) -> Tensor:
    """Keep mask without the `total` lowest scores of a matrix without NaN."""
    counts, threshold = lowest_counts(scores, total)
    return split_rows(scores, threshold.expand(counts.shape), counts)


def lowest_counts(values: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """How many of each row are among the `total` lowest of a matrix without NaN, and the highest of these (or -inf)."""
    below = torch.zeros(values.shape[0], dtype=torch.int64, device=values.device)
    if total == 0:
        return below, values.new_full((), -torch.inf)
    threshold = _kth_lowest(values, total)
    equal = torch.zeros_like(below)
    for rows in _row_blocks(values):
        below[rows] = (values[rows] < threshold).sum(dim=1)
        equal[rows] = (values[rows] == threshold).sum(dim=1)
    spare = total - below.sum() - (equal.cumsum(0) - equal)
    return below + spare.clamp(min=0).minimum(equal), threshold


def sort_rows(scores: Tensor) -> Tensor:
    """The scores of every row in ascending order, a new tensor. scores: float32 or float64 [D_out, D_in]."""
    if scores.device.type == "cpu":  # numpy's vectorised sort: ten times as fast as torch's on one core
        return torch.from_numpy(np.sort(scores.detach().contiguous().numpy(), axis=1))
    return scores.sort(dim=1).values


def row_thresholds(ordered: Tensor, counts: Tensor) -> Tensor:
    """The highest score that goes in every row, [D_out]; -inf where none does. ordered: from `sort_rows`."""
    highest = ordered.gather(1, (counts - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    return highest.masked_fill(counts == 0, -torch.inf)


def split_rows(scores: Tensor, thresholds: Tensor, counts: Tensor) -> Tensor:
    """Keep mask without counts[k] scores of row k: all below thresholds[k], then those equal to it in order."""
    keep = scores > thresholds.unsqueeze(1)
    for rows in _row_blocks(scores):
        gone = scores.shape[1] - keep[rows].sum(dim=1)
        tied: slice | Tensor = rows
        if scores.device.type == "cpu":  # elsewhere asking which rows have ties takes longer than treating all alike
            some = (gone != counts[rows]).nonzero().squeeze(1)
            if not len(some):
                continue
            tied, gone = some + rows.start, gone[some]
        equal = scores[tied] == thresholds[tied].unsqueeze(1)
        going = counts[tied] - gone + equal.sum(dim=1)
        keep[tied] |= equal & (equal.cumsum(dim=1, dtype=torch.int32) > going.unsqueeze(1))
    return keep


def n_of_m(scores: Tensor, kept: int, group: int, *, check: bool = True) -> Tensor:
    """Keep mask with the `kept` highest scores of every `group` consecutive inputs. ValueError if none fits."""
    d_in = scores.shape[1]
    if not 0 < kept < group:
        raise ValueError(f"{kept}:{group} keeps {kept} of every {group} weights, which must be between 0 and {group}.")
    if d_in % group:
        raise ValueError(f"{kept}:{group} does not fit rows of {d_in} weights, since {group} does not divide {d_in}.")
    if check:
        refuse_nan(scores)
    keep = torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format).unflatten(1, (-1, group))
    for rows in _row_blocks(scores):
        places = scores[rows].unflatten(1, (-1, group)).movedim(2, 0).contiguous()
        for place in range(group):
            # Groups are small: counting the scores that go before is faster than sorting.
            rank = torch.zeros(places.shape[1:], dtype=torch.int32, device=scores.device)
            for other in range(group):
                rank += places[other] <= places[place] if other < place else places[other] < places[place]
            keep[rows, :, place] = rank >= group - kept
    return keep.flatten(1)


def pack(keep: Tensor) -> Tensor:
    """Keep bits packed by row, most significant bit first, the padding bits zero: uint8 [D_out, ceil(D_in / 8)]."""
    if keep.device.type == "cpu":
        return torch.from_numpy(np.packbits(keep.numpy(), axis=1))
    padded = torch.nn.functional.pad(keep, (0, -keep.shape[1] % 8))
    bits = padded.contiguous().view(torch.uint8).unflatten(1, (-1, 8))
    packed: Tensor = bits[..., 7].clone()
    for place in range(7):
        packed |= bits[..., place] << (7 - place)
    return packed


def unpack(packed: Tensor, d_in: int) -> Tensor:
    """The inverse of `pack`, bool [D_out, d_in]. Raises ValueError when the width is not that of d_in bits."""
    if packed.shape[1] != -(-d_in // 8):
        raise ValueError(f"{packed.shape[1]} bytes a row do not hold {d_in} bits; {-(-d_in // 8)} would.")
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=d_in).view(bool))
    keep = torch.empty((*packed.shape, 8), dtype=torch.bool, device=packed.device)
    for place in range(8):
        keep[..., place] = (packed & (128 >> place)) != 0
    return keep.flatten(1)[:, :d_in].contiguous()


def project(sparsity: Tensor, weights: Tensor, target: float, cap: float) -> Tensor:
    """Shift sparsities [n] by one number, clipped to [0, max(cap, target)], onto a weighted mean, float64 [n].

    Exact to float64's precision, on the CPU. Raises ValueError for what has no such shift.
    """
    # numpy's: of some hundred numbers, torch spends nearly all of its time on the way to them.
    start, shares = sparsity.double().cpu().numpy(), weights.double().cpu().numpy()
    if not 0 <= target <= 1:
        raise ValueError(f"the target sparsity {target} is not between 0 and 1.")
    if not np.isfinite(start).all():
        raise ValueError("a sparsity to project is not finite.")
    if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
        raise ValueError("the weights of a projection must be finite, not negative and not all zero.")
    top = max(cap, target)
    shares = shares / shares.sum()
    if target in (0, top) or (start == start[0]).all():
        return torch.full(start.shape, target, dtype=torch.float64)
    # Already there up to rounding: shifting by rounding errors would undo a projection's idempotence.
    inside = ((start >= 0) & (start <= top)).all()
    if inside and abs(start @ shares - target) <= 4 * np.finfo(np.float64).eps:
        return torch.from_numpy(start.copy())
    return torch.from_numpy(_clipped(start + _shift(start, shares, target, top), top))


def _clipped(values: np.ndarray, top: float) -> np.ndarray:
    return np.minimum(np.maximum(values, 0.0, out=values), top, out=values)


def _shift(start: np.ndarray, shares: np.ndarray, target: float, top: float) -> float:
    """The shift under which the clipped mean is `target`: Newton's steps inside a bracket, which halves otherwise."""
    low, high = -float(start.max()), top - float(start.min())
    sure = 2 * len(start) * np.finfo(np.float64).eps  # what rounding makes of a sum of shares
    shift, best, least = min(max(0.0, low), high), 0.0, math.inf
    while True:
        moved = start + shift
        slope = float(shares @ ((moved > 0) & (moved < top)))
        missing = float(_clipped(moved, top) @ shares) - target
        if abs(missing) >= least <= sure:
            return best
        if abs(missing) < least:
            best, least = shift, abs(missing)
        low, high = (low, shift) if missing > 0 else (shift, high)
        following = shift - missing / slope if slope else low
        if not low < following < high:
            following = (low + high) / 2
        if following in (low, high):
            return best
        shift = following


def _row_blocks(scores: Tensor) -> Iterator[slice]:
    """Slices that together are all rows of `scores`, each of at most some four million scores or one row."""
    return slices(len(scores), max(1, _BLOCK // max(scores.shape[1], 1)))


def slices(count: int, step: int) -> Iterator[slice]:
    """Slices of `step` that together are 0..count-1; the last may be shorter."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def refuse_nan(scores: Tensor) -> None:
    """Raise ValueError for scores, or weights chosen and updated by them, that hold NaN."""
    if scores.max().isnan():  # the maximum of anything with NaN is NaN, and needs no mask of the whole matrix
        raise ValueError("the scores hold NaN; the weights or the statistics they come from are damaged.")


def _kth_lowest(values: Tensor, k: int) -> Tensor:
    """The k-th lowest of all values, k from 1, a scalar."""
    if values.device.type == "cpu":  # a ninth of the time of torch.kthvalue, and a third of the memory
        return values.new_tensor(np.partition(values.detach().contiguous().numpy(), k - 1, axis=None)[k - 1])
    return values.flatten().kthvalue(k).values
