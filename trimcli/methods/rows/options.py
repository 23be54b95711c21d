"""The options of TRIM (Beck et al. 2025)."""

from dataclasses import dataclass

from trimcli.methods.rows.metrics import QUALITIES, ROW_QUALITIES
from trimcli.options import check_fields, option, positive

PANEL = "TRIM rows"


@dataclass(frozen=True)
class TrimOptions:
    """How rows are searched. Raises OptionError for an unknown metric and for no iterations."""

    qmetric: str = option(
        "cosim_flat", "Quality of a matrix's outputs that the search maximises.", panel=PANEL, choices=lambda: QUALITIES
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
