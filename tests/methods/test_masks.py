"""Counts, selections and packing against plain Python loops."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimcli.methods import masks
from trimcli.methods.ranking import ranks_of, row_order
from trimcli.options import Numerics

sparsities = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.7, 1.0]))

untimed = settings(deadline=None)  # the first example pays for torch's warming up


@st.composite
def score_matrices(draw: st.DrawFn) -> Tensor:
    """Small matrices: no ties, many ties, zero rows or columns, negative zero."""
    d_out, d_in = draw(st.integers(1, 7)), draw(st.integers(1, 20))
    seed = draw(st.integers(0, 2**32 - 1))
    scores = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))
    if draw(st.booleans()):
        scores = scores.mul(draw(st.sampled_from([0.5, 2.0]))).round()
    if draw(st.booleans()):
        scores = scores.abs()
    if draw(st.booleans()):
        scores[draw(st.integers(0, d_out - 1))] = 0
    if draw(st.booleans()):
        scores[:, draw(st.integers(0, d_in - 1))] = 0
    return scores


def slow_lowest(scores: list[float], count: int) -> list[bool]:
    """Keep flags without the `count` lowest; Python's sort is stable."""
    going = sorted(range(len(scores)), key=lambda index: scores[index])[:count]
    return [index not in going for index in range(len(scores))]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_BLOCK", 8)


@untimed
@given(st.integers(1, 40), st.integers(1, 40), sparsities)
def test_matrix_budget_and_even_counts(d_out: int, d_in: int, sparsity: float) -> None:
    budget = masks.matrix_budget(d_out, d_in, sparsity)
    assert budget == round(sparsity * d_out * d_in)
    exact = masks.even_row_counts(d_out, d_in, sparsity, "exact").tolist()
    assert sum(exact) == budget
    assert max(exact) - min(exact) <= 1
    assert exact == sorted(exact, reverse=True)
    reference = masks.even_row_counts(d_out, d_in, sparsity, "reference")
    assert reference.dtype == torch.int64
    assert reference.tolist() == [int(d_in * sparsity)] * d_out


def test_reference_counts_follow_floating_point() -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point, and the published code takes its floor.
    assert masks.even_row_counts(1, 100, 0.29, "reference").tolist() == [28]
    assert masks.even_row_counts(1, 100, 0.29, "exact").tolist() == [29]


@pytest.mark.parametrize("numerics", ["exact", "reference"])
def test_counts_stay_within_the_matrix(numerics: Numerics) -> None:
    assert masks.even_row_counts(2, 5, 1.2, numerics).tolist() == [5, 5]
    assert masks.even_row_counts(2, 5, -0.3, numerics).tolist() == [0, 0]


def slow_round(ideal: list[float], total: int) -> list[int]:
    counts = [int(value) for value in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda row: (counts[row] - ideal[row], row))
    for row in by_remainder[: total - sum(counts)]:
        counts[row] += 1
    return counts


@untimed
@given(st.lists(st.integers(0, 64), min_size=1, max_size=12), st.integers(1, 50))
def test_round_row_counts_gives_the_largest_remainders_one_more(eighths: list[int], d_in: int) -> None:
    row_sparsity = [value / 64 for value in eighths]
    ideal = [value * d_in for value in row_sparsity]
    total = round(sum(ideal))
    counts = masks.round_row_counts(torch.tensor(row_sparsity), d_in, total)
    assert counts.dtype == torch.int64
    assert counts.tolist() == slow_round(ideal, total)


@untimed
@given(st.lists(st.floats(-0.25, 1.25, width=32), min_size=1, max_size=9), st.integers(1, 20), st.floats(0, 1))
def test_round_row_counts_always_reaches_the_total(row_sparsity: list[float], d_in: int, part: float) -> None:
    total = round(part * d_in * len(row_sparsity))
    counts = masks.round_row_counts(torch.tensor(row_sparsity), d_in, total)
    assert int(counts.sum()) == total
    assert int(counts.min()) >= 0
    assert int(counts.max()) <= d_in


@untimed
@given(st.integers(1, 30), st.integers(1, 30), sparsities)
def test_rounding_equal_rows_is_the_even_split(d_out: int, d_in: int, sparsity: float) -> None:
    even = masks.even_row_counts(d_out, d_in, sparsity, "exact")
    rows = torch.full((d_out,), sparsity, dtype=torch.float64)
    assert torch.equal(masks.round_row_counts(rows, d_in, int(even.sum())), even)


def test_round_row_counts_gives_back_from_the_smallest_remainder() -> None:
    assert masks.round_row_counts(torch.tensor([0.5, 0.55, 0.5]), 10, 14).tolist() == [5, 5, 4]


def test_round_row_counts_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="2 rows of 3 weights cannot lose 7"):
        masks.round_row_counts(torch.zeros(2), 3, 7)
    with pytest.raises(ValueError, match="not finite"):
        masks.round_row_counts(torch.tensor([0.5, torch.nan]), 3, 2)


@untimed
@given(score_matrices(), st.data())
def test_lowest_per_row_and_ranks_take_the_stable_lowest(scores: Tensor, data: st.DataObject) -> None:
    d_out, d_in = scores.shape
    counts = torch.tensor(data.draw(st.lists(st.integers(0, d_in), min_size=d_out, max_size=d_out)))
    expected = [slow_lowest(row, int(count)) for row, count in zip(scores.tolist(), counts, strict=True)]
    assert masks.lowest_per_row(scores, counts).tolist() == expected
    assert masks.keep_from_ranks(ranks_of(row_order(scores)), counts).tolist() == expected


@untimed
@given(score_matrices(), sparsities)
def test_lowest_overall_exact_takes_the_stable_lowest(scores: Tensor, sparsity: float) -> None:
    keep = masks.lowest_overall(scores, sparsity, "exact")
    count = round(sparsity * scores.shape[0] * scores.shape[1])
    assert keep.flatten().tolist() == slow_lowest(scores.flatten().tolist(), count)


@untimed
@given(score_matrices(), sparsities)
def test_lowest_overall_reference_takes_all_up_to_the_threshold(scores: Tensor, sparsity: float) -> None:
    flat = scores.flatten().tolist()
    threshold = sorted(flat)[min(int(len(flat) * sparsity), len(flat) - 1)]
    keep = masks.lowest_overall(scores, sparsity, "reference")
    assert keep.flatten().tolist() == [score > threshold for score in flat]


@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_rows_change_nothing() -> None:
    scores = torch.randint(0, 4, (9, 6), generator=torch.Generator().manual_seed(1)).float()
    counts = torch.tensor([0, 1, 2, 3, 4, 5, 6, 3, 3])
    rows = [slow_lowest(row, int(count)) for row, count in zip(scores.tolist(), counts, strict=True)]
    assert masks.lowest_per_row(scores, counts).tolist() == rows
    assert masks.keep_from_ranks(ranks_of(row_order(scores)), counts).tolist() == rows
    assert masks.lowest_overall(scores, 0.45, "exact").flatten().tolist() == slow_lowest(
        scores.flatten().tolist(), round(0.45 * 54)
    )
    assert masks.n_of_m(scores, 1, 3).tolist() == slow_n_of_m(scores, 1, 3)


def test_a_transposed_matrix_is_read_by_its_own_rows() -> None:
    scores = torch.randn(5, 8, generator=torch.Generator().manual_seed(2)).T
    counts = torch.arange(8) % 6
    assert torch.equal(masks.lowest_per_row(scores, counts), masks.lowest_per_row(scores.contiguous(), counts))
    assert torch.equal(
        masks.lowest_overall(scores, 0.3, "exact"), masks.lowest_overall(scores.contiguous(), 0.3, "exact")
    )


@pytest.mark.parametrize(
    ("d_in", "dtype"), [(1, torch.int16), (32767, torch.int16), (32768, torch.int32), (33000, torch.int32)]
)
def test_ranks_and_counts_reach_the_full_width(d_in: int, dtype: torch.dtype) -> None:
    ranks = ranks_of(row_order(torch.arange(d_in, 0, -1, dtype=torch.float32).unsqueeze(0)))
    assert ranks.dtype == dtype
    assert ranks[0].tolist() == list(range(d_in - 1, -1, -1))
    assert not masks.keep_from_ranks(ranks, torch.tensor([d_in])).any()
    assert masks.keep_from_ranks(ranks, torch.tensor([0])).all()


@pytest.mark.parametrize(
    "select",
    [
        lambda scores: masks.lowest_per_row(scores, torch.tensor([1, 1])),
        lambda scores: masks.lowest_overall(scores, 0.5, "exact"),
        lambda scores: masks.lowest_overall(scores, 0.5, "reference"),
        lambda scores: masks.n_of_m(scores, 1, 2),
        row_order,
    ],
)
def test_nan_scores_are_refused(select: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="NaN"):
        select(torch.tensor([[1.0, 2.0], [torch.nan, 3.0]]))


def slow_n_of_m(scores: Tensor, kept: int, group: int) -> list[list[bool]]:
    return [
        [flag for start in range(0, len(row), group) for flag in slow_lowest(row[start : start + group], group - kept)]
        for row in scores.tolist()
    ]


@untimed
@given(score_matrices(), st.integers(2, 9), st.data())
def test_n_of_m_keeps_the_highest_of_every_group(scores: Tensor, group: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, group - 1))
    scores = scores.repeat(1, group)
    assert masks.n_of_m(scores, kept, group).tolist() == slow_n_of_m(scores, kept, group)


def test_n_of_m_takes_wide_groups() -> None:
    scores = torch.randint(0, 99, (2, 80), generator=torch.Generator().manual_seed(3)).float()
    assert masks.n_of_m(scores, 7, 40).tolist() == slow_n_of_m(scores, 7, 40)


@pytest.mark.parametrize("kept", [0, 4, 5, -1])
def test_n_of_m_refuses_an_impossible_pattern(kept: int) -> None:
    with pytest.raises(ValueError, match=f"{kept}:4 keeps"):
        masks.n_of_m(torch.zeros(2, 8), kept, 4)


def test_n_of_m_refuses_rows_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="2:4 does not fit rows of 10 weights, since 4 does not divide 10"):
        masks.n_of_m(torch.zeros(2, 10), 2, 4)


@untimed
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_pack_is_big_endian_bits_and_unpack_its_inverse(d_out: int, d_in: int, seed: int) -> None:
    bits = np.random.default_rng(seed).random((d_out, d_in)) < 0.5
    packed = masks.pack(torch.from_numpy(bits))
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), np.packbits(bits, axis=1))
    assert np.array_equal(masks.unpack(packed, d_in).numpy(), bits)


def test_pack_reads_a_transposed_mask_by_its_own_rows() -> None:
    keep = torch.tensor([[True, False], [True, True], [False, True]]).T
    assert masks.pack(keep).tolist() == [[0b11000000], [0b01100000]]
    wide = (torch.arange(48).reshape(8, 6) % 3 == 0).T
    assert np.array_equal(masks.pack(wide).numpy(), np.packbits(wide.numpy(), axis=1))


def test_unpack_refuses_another_width() -> None:
    with pytest.raises(ValueError, match="3 bytes a row do not hold 10 bits; 2 would"):
        masks.unpack(torch.zeros(2, 3, dtype=torch.uint8), 10)


@untimed
@given(
    st.lists(st.tuples(st.floats(-0.5, 1.5), st.integers(1, 10**9)), min_size=1, max_size=20),
    st.floats(0, 1),
    st.sampled_from([0.95, 0.99]),
)
def test_projection_holds_mean_bounds_and_one_shift(rows: list[tuple[float, int]], target: float, cap: float) -> None:
    start = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    weights = torch.tensor([row[1] for row in rows], dtype=torch.float64)
    top = max(cap, target)
    result = masks.project(start, weights, target, cap)
    assert result.dtype == torch.float64
    assert float(result.min()) >= 0
    assert float(result.max()) <= top
    assert float((result * weights).sum() / weights.sum()) == pytest.approx(target, abs=2e-15)
    shifts = result - start
    free = (result > 0) & (result < top)
    if free.any():
        shift = float(shifts[free].mean())
        torch.testing.assert_close(result, (start + shift).clamp(0, top), atol=1e-14, rtol=0)
    torch.testing.assert_close(masks.project(result, weights, target, cap), result, atol=2e-15, rtol=0)


@pytest.mark.parametrize(
    ("start", "target", "expected"),
    [
        ([0.1, 0.7], 0.0, [0.0, 0.0]),
        ([0.1, 0.7], 0.97, [0.97, 0.97]),
        ([0.1, 0.7], 1.0, [1.0, 1.0]),
        ([0.3, 0.3], 0.7, [0.7, 0.7]),
        ([0.6, 0.8], 0.7, [0.6, 0.8]),
        ([0.5], 0.7, [0.7]),
    ],
)
def test_projection_is_exact_where_it_can_be(start: list[float], target: float, expected: list[float]) -> None:
    result = masks.project(torch.tensor(start, dtype=torch.float64), torch.ones(len(start)), target, 0.95)
    assert result.tolist() == expected


def test_projection_shares_among_the_others_what_the_cap_takes() -> None:
    result = masks.project(torch.tensor([1.4, 0.5, 0.3, -0.9]), torch.tensor([1.0, 2.0, 1.0, 0.0]), 0.7, 0.95)
    shift = (0.7 * 4 - 0.95 - 2 * 0.5 - 0.3) / 3
    assert result.tolist() == pytest.approx([0.95, 0.5 + shift, 0.3 + shift, 0.0], abs=1e-7)


@pytest.mark.parametrize("target", [-0.1, 1.1, float("nan")])
def test_projection_refuses_an_impossible_target(target: float) -> None:
    with pytest.raises(ValueError, match="not between 0 and 1"):
        masks.project(torch.zeros(2), torch.ones(2), target, 0.95)


def bisected(start: Tensor, weights: Tensor, target: float, top: float) -> Tensor:
    """The projection by plain bisection, every step of it."""
    shares = weights / weights.sum()

    def excess(shift: float) -> float:
        return float((start + shift).clamp(0, top) @ shares) - target

    low, high = -float(start.max()), top - float(start.min())
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) <= 0 else (low, middle)
    return (start + min(low, high, key=lambda shift: abs(excess(shift)))).clamp(0, top)


@pytest.mark.parametrize("spread", [1e-3, 0.05, 0.5, 3.0])
@pytest.mark.parametrize("two_values", [False, True])
def test_projection_is_plain_bisections(spread: float, two_values: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    for count in (2, 3, 17, 256, 301):
        target = 0.1 + 0.8 * float(torch.rand((), generator=draw))
        drawn = torch.randn(count, generator=draw, dtype=torch.float64)
        start = target + spread * ((drawn > 0).double() if two_values else drawn)
        for weights in (torch.ones(count).double(), torch.rand(count, generator=draw).double() ** 4):
            if bool((start == start[0]).all()):
                continue
            expected = bisected(start, weights, target, max(0.95, target))
            torch.testing.assert_close(masks.project(start, weights, target, 0.95), expected, atol=2e-13, rtol=0)


def test_projection_refuses_bad_vectors() -> None:
    with pytest.raises(ValueError, match="not finite"):
        masks.project(torch.tensor([0.1, torch.inf]), torch.ones(2), 0.5, 0.95)
    for weights in ([0.0, 0.0], [1.0, -1.0], [1.0, torch.nan]):
        with pytest.raises(ValueError, match="weights of a projection"):
            masks.project(torch.zeros(2), torch.tensor(weights), 0.5, 0.95)
