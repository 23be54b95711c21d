"""Which weights of a matrix go: a score and a budget, for the whole matrix or for a block of its columns."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from trimcli.errors import OptionError
from trimcli.methods.stats import LinearStats
from trimcli.options import Numerics, fraction

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.scores import Score


class Target(NamedTuple):
    """What one matrix is to lose: a fraction, or N kept of M by `pattern` (whose sparsity then is 1 - N/M)."""

    sparsity: float
    pattern: tuple[int, int] | None = None


@dataclass(frozen=True)
class Choice:
    """What goes: all but a row allocation's `keep`, bool [D_out, D_in], or, without one, by score and target.

    free: bool [D_out, D_in], False for weights that go in any case, before all others; None where there are none.
    compare: the comparison group, None for the score's own.
    """

    score: Score
    stats: LinearStats
    target: Target
    numerics: Numerics = "exact"
    options: object = None
    keep: Tensor | None = None
    free: Tensor | None = None
    compare: Literal["row", "matrix"] | None = None

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N:M, (kept, group), where that is the budget."""
        return self.target.pattern if self.keep is None else None

    def scores(self, weight: Tensor, columns: slice = slice(None)) -> Tensor:
        """Scores of the columns `weight` [D_out, n], float32 like it."""
        stats = self.stats if columns == slice(None) else self.stats.of(columns)
        found: Tensor = self.score(weight, stats, options=self.options)
        return found if self.free is None else found.masked_fill(~self.free[:, columns], float("-inf"))

    def of_matrix(self, weight: Tensor) -> Tensor:
        """The keep mask of the whole matrix, bool [D_out, D_in]."""
        if self.keep is not None:
            return self.keep if self.free is None else self.keep & self.free
        return self.of_scores(self.scores(weight))

    def of_scores(self, scores: Tensor, share: float = 1.0) -> Tensor:
        """The keep mask, bool [D_out, D_in], by other scores under this budget, or under a `share` of what goes.

        Of a row allocation's mask the rows' counts are the budget.
        """
        from trimcli.methods import masks

        (d_out, d_in), (sparsity, pattern) = scores.shape, self.target
        if self.free is not None:
            scores = scores.masked_fill(~self.free, float("-inf"))
        if self.keep is not None:
            keep = masks.lowest_per_row(scores, (~self.keep).sum(dim=1).double().mul_(share).round_().long())
        elif pattern is not None:
            keep = masks.n_of_m(scores, *pattern)
        elif (self.compare or self.score.compare) == "row":
            counts = masks.even_row_counts(d_out, d_in, share * sparsity, self.numerics, scores.device)
            keep = masks.lowest_per_row(scores, counts)
        else:
            keep = masks.lowest_overall(scores, share * sparsity, self.numerics)
        return keep if self.free is None else keep & self.free

    def of_columns(self, weight: Tensor, start: int) -> Tensor:
        """The keep mask of the columns `weight` [D_out, n] from `start` on, chosen as an update reaches them.

        Exact: whenever a block ends at column c, the first c have lost round(sparsity * D_out * c) weights. Reference:
        every block is pruned to the sparsity by itself, as published. NaN is for the update to refuse, once at its end.
        """
        from trimcli.methods import masks

        d_out, end = weight.shape[0], start + weight.shape[1]
        scores = self.scores(weight, slice(start, end))
        sparsity, pattern = self.target
        if pattern is not None:
            keep = masks.n_of_m(scores, *pattern, check=False)
        elif self.numerics == "reference":
            keep = masks.lowest_overall(scores, sparsity, "reference", check=False)
        elif (self.compare or self.score.compare) == "row":
            before = masks.even_row_counts(d_out, start, sparsity, "exact", weight.device)
            after = masks.even_row_counts(d_out, end, sparsity, "exact", weight.device)
            keep = masks.lowest_per_row(scores, after - before, check=False)
        else:
            total = masks.matrix_budget(d_out, end, sparsity) - masks.matrix_budget(d_out, start, sparsity)
            keep = masks.lowest_in_all(scores, total)
        return keep if self.free is None else keep & self.free[:, start:end]


def parse_pattern(text: str) -> tuple[int, int] | None:
    """A sparsity type as (kept, group): "2:4" -> (2, 4), "unstructured" -> None. Raises OptionError for others."""
    if text == "unstructured":
        return None
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        near = difflib.get_close_matches(text, ["unstructured"])
        hint = "did you mean unstructured?" if near else "give one such as 2:4."
        what = "is neither 'unstructured' nor N:M, 0 < N < M: N is how many of every M consecutive weights are kept"
        raise OptionError(f"the sparsity type {text!r} {what}; {hint}")
    return int(found[1]), int(found[2])


def uniform_target(sparsity: float | None, sparsity_type: str) -> Target:
    """The one target of --sparsity and --sparsity-type. Raises OptionError for none or contradictory ones."""
    pattern = parse_pattern(sparsity_type)
    if pattern:
        implied = 1 - pattern[0] / pattern[1]
        if sparsity is not None and abs(sparsity - implied) > 1e-9:
            what = f"{pattern[0]} kept of {pattern[1]} implies {implied:g}; drop --sparsity."
            raise OptionError(f"--sparsity {sparsity} with --sparsity-type {sparsity_type}: {what}")
        return Target(implied, pattern)
    if sparsity is None:
        raise OptionError("no target was given; give --sparsity T, --sparsity-type N:M or --ratios FILE.")
    fraction("--sparsity", sparsity)
    return Target(sparsity)
