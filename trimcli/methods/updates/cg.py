"""CG: under any mask, the kept weights that reproduce the dense outputs best, row by row to the optimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimcli.methods.heldout import Judged, judge
from trimcli.methods.stats import CROSS, FITTING, HELDOUT, LinearStats
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
    "cg",
    needs={FITTING, HELDOUT},
    title="CG",
    working=27,
    source="Hestenes & Stiefel 1952; Meng et al. 2024",
    options=FitOptions,
    aims=True,
)
def cg(weight: Tensor, choice: Choice, options: FitOptions) -> Updated:
    """The kept weights become the best under their mask, all rows at once, by conjugate gradients."""
    return never_worse("cg", weight, choice.of_matrix(weight), choice.stats, options)


def never_worse(
    step: str,
    weight: Tensor,
    keep: Tensor,
    stats: LinearStats,
    options: FitOptions,
    start: Tensor | None = None,
    instead: Tensor | None = None,
) -> Updated:
    """The weights fitted under `keep`, or as they were under the mask before where that is better on held-out samples.

    start: where the fit begins. instead: the mask before, where `keep` is a new one. Where the statistics tell of the
    dense model's inputs, its own outputs are aimed at.
    """
    from trimcli.methods.updates.aim import aimed
    from trimcli.methods.updates.cg_solver import fitted

    def fit(target: Tensor, start: Tensor | None) -> Tensor:
        return fitted(target, keep, stats[FITTING], ridge=options.ridge, steps=options.cg_steps, start=start)

    instead = keep if instead is None else instead
    found, before, judged = fit(weight, start), weight * instead, list[Judged]()
    if CROSS in stats:
        found, chosen = aimed(weight, found, stats, options.ridge, lambda target: fit(target, found))
        judged.append(chosen)
    judged.append(judge(step, weight, before, found, stats))
    if judged[-1].better:
        return Updated(keep, found, judged=tuple(judged))
    return Updated(instead, before, judged=tuple(judged))
