"""Swaps: inside a row one weight goes and another returns, as long as that lowers the error of the row's outputs.

The error of a row w under a mask is d G d^T, d the weights that went and G the inputs' Gram. With r = G d, pruning u
and regrowing p changes it by 2 w_u r_u + w_u^2 G_uu - 2 w_p r_p + w_p^2 G_pp - 2 w_u w_p G_up, exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trimcli.methods.heldout import Judged, judge
from trimcli.methods.stats import FITTING

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.choice import Choice

# Bytes a weight of the matrix at the peak, beside the float32 weight.
WORKING = 24


def swapped(weight: Tensor, choice: Choice) -> tuple[Choice, Judged]:
    """A choice of as many weights of every row, or every group of an N:M pattern, and what held-out samples say of it.

    weight: float32 [D_out, D_in]. Where they say that it is worse, the choice stays as it was.
    """
    from trimcli.methods.refine.swap_search import search

    keep, stats = choice.of_matrix(weight), choice.stats
    group = choice.pattern[1] if choice.pattern else None
    found = search(weight, keep, stats[FITTING], group=group, free=choice.free)
    judged = judge("swaps", weight, weight * keep, weight * found, stats)
    return replace(choice, keep=found if judged.better else keep), judged
