"""Row allocation: how many weights each row of a matrix loses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimcli.registry import Entry, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.rows.search import RowResult


@dataclass(frozen=True)
class Rows:
    """What a row allocation chose.

    keep: bool [D_out, D_in]; None leaves the choice to the score's comparison group. found: what a search tells of
    its rows, for `--stats-out`.
    """

    keep: Tensor | None = None
    found: RowResult | None = None


@dataclass(frozen=True, kw_only=True)
class RowAllocation(Entry):
    """A row allocation: function(weight float32 [D_out, D_in], choice[, options]) gives Rows.

    `choice` (see `trimcli.methods.choice`) has the scores, the target, the statistics and the numerics. only: the one
    score that it goes with; None for all.
    """

    only: str | None = None


ROWS = Registry("row allocation", "--rows", RowAllocation)
row_allocation = ROWS.register
"""Register the decorated function as a row allocation."""
