"""The options of LLM-Barber (Su et al. 2024)."""

from dataclasses import dataclass
from typing import Literal

from trimcli.errors import OptionError
from trimcli.options import check_fields, option

PANEL = "LLM-Barber"


def _share(option: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise OptionError(f"{option} {value} is not a share of the pairs; give 0 to 1.")


@dataclass(frozen=True)
class BarberOptions:
    """How masks are rebuilt; N:M patterns pair per row whatever granularity says. Raises OptionError.

    metric: |base| * sqrt(g), |base| or sqrt(g), base the dense or, under retain_reconstruction, the sparse weights.
    """

    granularity: Literal["block", "layer", "output1", "input1"] = option(
        "output1",
        "The unit whose weights are paired: all linears of a block, one matrix, each row, each column.",
        "--prune-granularity",
        panel=PANEL,
    )
    metric: Literal["WD", "W", "D"] = option(
        "WD", "A weight's worth: its magnitude times its gradient, or one of the two.", "--prune-metric", panel=PANEL
    )
    threshold: float = option(0.01, "Share of a unit's improving pairs that swap.", panel=PANEL, check=_share)
    retain_reconstruction: bool = option(
        False, "Kept weights keep the sparse model's values (SparseGPT's) instead of the dense ones.", panel=PANEL
    )

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs_gradients(self) -> bool:
        """Whether the metric reads gradients at all (`W` does not)."""
        return self.metric != "W"
