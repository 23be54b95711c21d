"""The Wanda variant against plain Python loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimcli.methods.choice import Choice, Target
from trimcli.methods.rows.base import ROWS
from trimcli.methods.rows.variant import variant_keep
from trimcli.methods.scores import SCORES
from trimcli.methods.stats import LinearStats
from trimcli.options import Numerics

NUMERICS: tuple[Numerics, ...] = ("exact", "reference")
untimed = settings(deadline=None)  # the first example pays for torch's warming up


@st.composite
def score_matrices(draw: st.DrawFn) -> Tensor:
    """Small non-negative matrices: no ties, many ties, zero rows or columns."""
    d_out, d_in = draw(st.integers(1, 7)), draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**32 - 1))
    scores = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed)).abs()
    if draw(st.booleans()):
        scores = scores.mul(2).round()
    if draw(st.booleans()):
        scores[draw(st.integers(0, d_out - 1))] = 0
    if draw(st.booleans()):
        scores[:, draw(st.integers(0, d_in - 1))] = 0
    return scores


def running_sums(row: list[float]) -> list[tuple[int, np.float32]]:
    """Of a row's scores in stable ascending order: index and running sum, rounded to float32."""
    total, found = 0.0, []
    for index in sorted(range(len(row)), key=lambda index: row[index]):
        total += row[index]
        found.append((index, np.float32(total)))
    return found


def slow_at(scores: Tensor, sums: Tensor, alpha: float) -> list[list[bool]]:
    """The mask at one alpha, scores equal to a row's last going with it."""
    keep = []
    for row, row_sum in zip(scores.tolist(), sums, strict=True):
        limit = np.float32(float(row_sum)) * np.float32(alpha)
        going = [row[index] for index, total in running_sums(row) if total <= limit]
        keep.append([score > max(going, default=-1.0) for score in row])
    return keep


def slow_reference(scores: Tensor, sparsity: float) -> list[list[bool]]:
    sums = scores.sum(dim=1)
    alpha, low, high = 0.4, 0.0, 0.8
    while True:
        keep = slow_at(scores, sums, alpha)
        achieved = np.float32(sum(not flag for row in keep for flag in row) / scores.numel())
        if abs(achieved - np.float32(sparsity)) <= np.float32(0.001) or high - low < 0.001:
            return keep
        if achieved > np.float32(sparsity):
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha


def slow_exact(scores: Tensor, sparsity: float) -> list[list[bool]]:
    """Take weight after weight, the lowest running sum relative to its row's sum first."""
    entries = []
    for row, (values, row_sum) in enumerate(zip(scores.tolist(), scores.sum(dim=1), strict=True)):
        for place, (index, total) in enumerate(running_sums(values)):
            relative = total / np.float32(float(row_sum)) if row_sum else np.float32(0)
            entries.append((relative, row, place, index))
    keep = torch.ones(scores.shape, dtype=torch.bool)
    for _, row, _, index in sorted(entries)[: round(sparsity * scores.shape[0] * scores.shape[1])]:
        keep[row, index] = False
    return keep.tolist()


@untimed
@given(score_matrices(), st.floats(0.05, 0.95))
def test_reference_follows_the_bisection(scores: Tensor, sparsity: float) -> None:
    assert variant_keep(scores, sparsity, "reference").tolist() == slow_reference(scores, sparsity)


@untimed
@given(score_matrices(), st.floats(0, 1))
def test_exact_takes_the_lowest_relative_running_sums(scores: Tensor, sparsity: float) -> None:
    assert variant_keep(scores, sparsity, "exact").tolist() == slow_exact(scores, sparsity)


@untimed
@given(score_matrices(), st.floats(0.1, 0.9))
def test_exact_extends_or_shrinks_what_an_alpha_gives(scores: Tensor, alpha: float) -> None:
    """Filling up or giving back from any alpha: the exact mask holds its mask, or is held by it."""
    sums = scores.sum(dim=1)
    relative = scores.sort(dim=1, stable=True).values.cumsum(1) / sums.masked_fill(sums == 0, 1).unsqueeze(1)
    order = scores.argsort(dim=1, stable=True)
    at_alpha = torch.ones(scores.shape, dtype=torch.bool).scatter_(1, order, relative > alpha)
    for sparsity in (0.2, 0.5, 0.8):
        exact = variant_keep(scores, sparsity, "exact")
        assert not (exact & ~at_alpha).any() or not (~exact & at_alpha).any()


def test_a_row_whose_lowest_score_is_too_large_loses_nothing() -> None:
    scores = torch.tensor([[0.0, 5.0], [1.0, 1.0]])
    for numerics in NUMERICS:
        assert variant_keep(scores, 0.25, numerics).tolist() == [[False, True], [True, True]]


def test_only_in_reference_do_equal_scores_go_together() -> None:
    # Three of the four ones have a running sum within 0.4 of the row's, 3.2.
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 4.0]])
    assert variant_keep(scores, 0.8, "reference").tolist() == [[False, False, False, False, True]]
    assert variant_keep(scores, 0.6, "exact").tolist() == [[False, False, False, True, True]]


def test_reference_comes_within_a_thousandth_and_exact_hits() -> None:
    scores = torch.randn(64, 256, generator=torch.Generator().manual_seed(4)).abs()
    for sparsity in (0.3, 0.6, 0.7):
        reference = variant_keep(scores, sparsity, "reference")
        assert abs(float((~reference).float().mean()) - sparsity) <= 0.0011
        assert int((~variant_keep(scores, sparsity, "exact")).sum()) == round(sparsity * 64 * 256)


def test_scores_are_left_alone_and_may_be_transposed() -> None:
    scores = torch.rand(12, 8, generator=torch.Generator().manual_seed(5))
    before = scores.clone()
    assert torch.equal(variant_keep(scores.T, 0.5, "exact"), variant_keep(scores.T.contiguous(), 0.5, "exact"))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("numerics", NUMERICS)
def test_scores_without_a_finite_sum_are_refused(bad: float, numerics: Numerics) -> None:
    scores = torch.ones(2, 4)
    scores[1, 2] = bad
    with pytest.raises(ValueError, match="no finite sum"):
        variant_keep(scores, 0.5, numerics)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_the_row_allocation_goes_by_wanda_scores(numerics: Numerics) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, sqnorm = torch.randn(9, 30, generator=generator), torch.rand(30, generator=generator)
    stats = LinearStats(sqnorm=sqnorm)
    rows = ROWS["variant"](weight, Choice(SCORES["wanda"], stats, Target(0.6), numerics))
    assert torch.equal(rows.keep, variant_keep(weight.abs() * sqnorm.sqrt(), 0.6, numerics))
    assert rows.found is None
    assert ROWS["variant"].only == "wanda"


def test_even_rows_leave_the_choice_to_the_score() -> None:
    rows = ROWS["even"](torch.ones(2, 2), Choice(SCORES["magnitude"], LinearStats(), Target(0.5)))
    assert (rows.keep, rows.found) == (None, None)
    assert list(ROWS)[:4] == ["even", "free", "trim", "variant"]
