"""ADMM: mask and weights of a matrix chosen together, against the dense outputs (Boža 2024; ALPS, Meng et al. 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimcli.methods.named import method
from trimcli.methods.stats import FITTING, HELDOUT
from trimcli.methods.updates.base import Updated, update
from trimcli.methods.updates.cg import FitOptions, never_worse

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.choice import Choice


@update(
    "admm",
    needs={FITTING, HELDOUT},
    title="ADMM",
    working=32,
    source="Boža 2024; Meng et al. 2024, section 3",
    options=FitOptions,
    chooses=True,
    aims=True,
)
def admm(weight: Tensor, choice: Choice, options: FitOptions) -> Updated:
    """Mask and weights together, by alternating directions; then the weights by conjugate gradients.

    Held-out samples compare them with dense weights under the score's own mask.
    """
    from trimcli.methods.updates.admm_solver import alternated

    keep, start = alternated(weight, choice, ridge=options.ridge, steps=options.admm_steps)
    return never_worse("admm", weight, keep, choice.stats, options, start, choice.of_matrix(weight))


method(
    "admm",
    score="wanda",
    update="admm",
    title="ADMM",
    help="Mask and weights of a matrix together, by ADMM and conjugate gradients, which changes the kept weights",
    source="Boža 2024; Meng et al. 2024",
)
