"""Scores: how much each weight matters. A score is a pure function and its entry in the registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trimcli.methods.stats import SQNORM, LinearStats
from trimcli.registry import Entry, Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Score(Entry):
    """A score: function(weight [D_out, D_in], stats[, options]) gives float32 likewise; the lowest go.

    compare: the comparison group. "row": every row loses alike, its own lowest; "matrix": the lowest of the matrix.
    """

    compare: Literal["row", "matrix"]


SCORES = Registry("score", "--mask-score", Score)
score = SCORES.register


@score("wanda", needs={SQNORM}, compare="row", title="Wanda", source="Sun et al. 2023, section 3")
def wanda(weight: Tensor, stats: LinearStats) -> Tensor:
    """Weight magnitude times input norm."""
    return weight.abs().float().mul_(stats.sqnorm.sqrt())


@score("magnitude", compare="matrix", title="Magnitude", source="Han et al. 2015, section 3")
def magnitude(weight: Tensor, stats: LinearStats) -> Tensor:
    """Weight magnitude."""
    return weight.abs().float()
