"""Row allocation: how many weights each row of a matrix loses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trimcli.registry import Entry, Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowResult:
    """What a search found for one matrix: the mask, on the scores' device, the rest on the CPU.

    counts: int64 [D_out], weights that go from each row. row_sparsity: float32 [D_out], what they were rounded from.
    quality_*: the matrix's at uniform sparsity and at the best. step, iteration: of the best, from 1; 0 for uniform
    sparsity. variance_*: of the row cosines. row_quality_*: float64 [D_out].
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
    """What a row allocation chose: the mask, or None and the comparison group that decides, None for the score's own.

    found: for `--stats-out`.
    """

    keep: Tensor | None = None
    found: RowResult | None = None
    compare: Literal["row", "matrix"] | None = None


@dataclass(frozen=True, kw_only=True)
class RowAllocation(Entry):
    """A row allocation: function(weight float32 [D_out, D_in], choice[, options]) gives Rows. only: the one score.

    searches: whether its Rows tell what was found. working: bytes a weight of the matrix at its peak, beside the
    float32 weight: scores, what is sorted, masks.
    """

    only: str | None = None
    searches: bool = False
    working: int = 20


ROWS = Registry("row allocation", "--rows", RowAllocation)
row_allocation = ROWS.register
