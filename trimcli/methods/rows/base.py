"""Row allocation: how many weights each row of a matrix loses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimcli.registry import Entry, Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowResult:
    """What a search found for one matrix.

    keep: bool [D_out, D_in] on the scores' device; the rest is on the CPU. counts: int64 [D_out], weights that go from
    each row. row_sparsity: float32 [D_out], what they were rounded from, its mean the target. quality_*: the matrix's,
    at uniform sparsity and at the winning iterate. step, iteration: where it won, counted from 1; 0 for uniform
    sparsity. At uniform sparsity and with `counts`: variance_*: sample variance over rows of the row cosine (0 for a
    single row); row_quality_*: float64 [D_out], the row metric.
    """

    keep: Tensor
    counts: Tensor
    row_sparsity: Tensor
    quality_uniform: float
    quality_best: float
    step: float
    iteration: int
    variance_before: float
    variance_after: float
    row_quality_before: Tensor
    row_quality_after: Tensor


@dataclass(frozen=True)
class Rows:
    """What a row allocation chose.

    keep: bool [D_out, D_in]; None leaves it to the score's comparison group. found: a search's, for `--stats-out`.
    """

    keep: Tensor | None = None
    found: RowResult | None = None


@dataclass(frozen=True, kw_only=True)
class RowAllocation(Entry):
    """A row allocation: function(weight float32 [D_out, D_in], choice: Choice[, options]) gives Rows.

    only: the one score that it goes with; None for all.
    """

    only: str | None = None


ROWS = Registry("row allocation", "--rows", RowAllocation)
row_allocation = ROWS.register
"""Register the decorated function as a row allocation."""
