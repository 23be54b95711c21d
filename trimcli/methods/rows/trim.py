"""TRIM: a sparsity for every row of a matrix by iterative search (Beck et al. 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimcli.methods.rows.base import Rows, row_allocation
from trimcli.methods.rows.options import TrimOptions
from trimcli.methods.stats import INPUTS

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.choice import Choice


@row_allocation(
    "trim",
    needs={INPUTS},
    title="TRIM",
    source="Beck et al. 2025, section 3",
    options=TrimOptions,
    searches=True,
    working=10,
)
def trim(weight: Tensor, choice: Choice, options: TrimOptions) -> Rows:
    """Rows whose outputs suffer little lose more, rows that suffer much lose fewer, by iterative search."""
    from trimcli.methods.rows.search import search_rows

    found = search_rows(
        weight, choice.scores(weight), choice.stats.inputs, choice.target.sparsity, options, choice.numerics
    )
    return Rows(found.keep, found)
