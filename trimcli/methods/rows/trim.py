"""TRIM: a sparsity for every row of a matrix by iterative search (Beck et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimcli.methods.rows.base import Rows, row_allocation
from trimcli.methods.rows.metrics import QUALITIES, ROW_QUALITIES
from trimcli.methods.stats import INPUTS
from trimcli.options import check_fields, option, positive

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.choice import Choice

PANEL = "TRIM rows"


@dataclass(frozen=True)
class TrimOptions:
    """How rows are searched. Raises OptionError for an unknown metric and for no iterations."""

    qmetric: str = option(
        "cosim_flat",
        "Quality of a whole matrix's outputs that the search maximises.",
        panel=PANEL,
        choices=lambda: QUALITIES,
    )
    qmetric_dimwise: str = option(
        "cosim", "Quality of each row that steers the search.", panel=PANEL, choices=lambda: ROW_QUALITIES
    )
    iterations: int = option(10, "Iterations of a search.", panel=PANEL, check=positive)
    forbid_negative: bool = option(
        False, "Never try negative steps, which take from the rows that suffer most.", "--forbid-neg-lr", panel=PANEL
    )

    def __post_init__(self) -> None:
        check_fields(self)


@row_allocation("trim", needs={INPUTS}, title="TRIM", source="Beck et al. 2025, section 3", options=TrimOptions)
def trim(weight: Tensor, choice: Choice, options: TrimOptions) -> Rows:
    """Rows whose outputs suffer little lose more, rows that suffer much lose fewer, by iterative search."""
    from trimcli.methods.rows.search import search_rows

    found = search_rows(
        weight, choice.scores(weight), choice.stats.inputs, choice.target.sparsity, options, choice.numerics
    )
    return Rows(found.keep, found)
