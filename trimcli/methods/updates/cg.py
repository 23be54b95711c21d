"""CG: under any mask, the kept weights that reproduce the dense outputs best, row by row to the optimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimcli.methods.heldout import judge
from trimcli.methods.stats import FITTING, HELDOUT, LinearStats
from trimcli.methods.updates.base import Updated, update
from trimcli.options import above_zero, check_fields, option, positive

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.choice import Choice

PANEL = "Conjugate gradients and ADMM"


@dataclass(frozen=True)
class FitOptions:
    """How the kept weights are fitted. ridge: of the Gram's mean diagonal. Raises OptionError for unusable values."""

    cg_steps: int = option(50, "Steps of conjugate gradients.", panel=PANEL, check=positive)
    ridge: float = option(0.01, "How strongly kept weights are held near dense ones.", panel=PANEL, check=above_zero)
    admm_steps: int = option(30, "Steps of ADMM before the mask is final.", panel=PANEL, check=positive)

    def __post_init__(self) -> None:
        check_fields(self)


@update(
    "cg", needs={FITTING, HELDOUT}, title="CG", source="Hestenes & Stiefel 1952; Meng et al. 2024", options=FitOptions
)
def cg(weight: Tensor, choice: Choice, options: FitOptions) -> Updated:
    """The kept weights become the best under their mask, all rows at once, by conjugate gradients."""
    from trimcli.methods.updates.cg_solver import fitted

    keep = choice.of_matrix(weight)
    found = fitted(weight, keep, choice.stats[FITTING], ridge=options.ridge, steps=options.cg_steps)
    return never_worse("cg", weight, keep, found, choice.stats)


def never_worse(step: str, weight: Tensor, keep: Tensor, found: Tensor, stats: LinearStats) -> Updated:
    """`found`, zero outside `keep`, where it is no worse on held-out samples than the weights as they were there."""
    before = weight * keep
    judged = judge(step, weight, before, found, stats)
    return Updated(keep, found if judged.better else before, judged=(judged,))
