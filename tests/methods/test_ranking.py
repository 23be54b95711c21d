"""Row orders against Python's stable sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimcli.methods import ranking
from trimcli.methods.ranking import ranks_of, row_order

TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@st.composite
def score_matrices(draw: st.DrawFn) -> Tensor:
    """With and without ties, both zeros, infinities; float types that are packed and one that is not."""
    shape = draw(st.integers(0, 6)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scores = torch.randn(shape, generator=generator)
    if draw(st.booleans()):
        scores = scores.round()
    scores[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2]))] = torch.inf
    scores[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2]))] = -0.0
    return scores.to(draw(st.sampled_from(TYPES)))


@settings(deadline=None)
@given(score_matrices())
def test_orders_and_ranks(scores: Tensor) -> None:
    order = row_order(scores)
    assert order.dtype == torch.int16
    expected = [sorted(range(len(row)), key=row.__getitem__) for row in scores.tolist()]
    assert order.tolist() == expected
    assert ranks_of(order).tolist() == [[row.index(column) for column in range(len(row))] for row in expected]


def test_many_blocks_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randint(0, 9, (37, 50), generator=torch.Generator().manual_seed(0)).float()
    expected = scores.argsort(dim=1, stable=True)
    monkeypatch.setattr(ranking, "_SMALLEST_BLOCK", 250)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    order = row_order(scores)
    assert torch.equal(order.long(), expected)
    assert torch.equal(ranks_of(order).long(), expected.argsort(dim=1))


def test_wide_rows_take_int32() -> None:
    scores = torch.arange(2**15 + 5, 0, -1.0).unsqueeze(0)
    order = row_order(scores)
    assert order.dtype == torch.int32
    assert torch.equal(order[0], torch.arange(2**15 + 4, -1, -1, dtype=torch.int32))
    assert torch.equal(ranks_of(order), order)


def test_scores_are_left_alone() -> None:
    scores = torch.tensor([[2.0, -0.0, -1.0]])
    assert row_order(scores).tolist() == [[2, 1, 0]]
    assert torch.equal(scores.signbit(), torch.tensor([[False, True, True]]))


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        row_order(torch.tensor([[1.0, torch.nan]]))
