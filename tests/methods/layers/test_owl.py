"""OWL against loops straight from the formulas."""

import gc
import statistics
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimcli.errors import OptionError
from trimcli.methods.layers.owl import keep_ratios, kept_of_group, outlier_share

shares = st.lists(st.floats(0, 100), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 8))
def test_outlier_share_is_that_of_the_concatenated_scores(seed: int, hyper_m: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(rows, 9, generator=generator).abs().exp() for rows in (3, 1, 7)]
    scores = [float(value) for matrix in matrices for value in matrix.flatten()]
    threshold = hyper_m * statistics.fmean(scores)
    expected = 100 * sum(score > threshold for score in scores) / len(scores)
    assert outlier_share(lambda: matrices, hyper_m) == pytest.approx(expected, abs=1e-12)


def test_one_score_matrix_is_alive_at_a_time() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def scores() -> Iterator[Tensor]:
        for _ in range(3):
            gc.collect()
            assert not [reference for reference in alive if reference() is not None]
            yield made()

    def made() -> Tensor:
        matrix = torch.rand(4, 4)
        alive.append(weakref.ref(matrix))
        return matrix

    outlier_share(scores, 1.5)
    assert len(alive) == 6


@given(shares, st.floats(0, 0.99), st.floats(0, 0.5))
def test_keep_ratios_follow_the_formula(outliers: list[float], target: float, lambda_: float) -> None:
    found = keep_ratios(torch.tensor(outliers, dtype=torch.float64), target, lambda_)
    low, high = min(outliers), max(outliers)
    ratios = [(value - low) / (high - low) * 2 * lambda_ if high > low else 0.0 for value in outliers]
    mean = sum(ratios) / len(ratios)
    assert found.tolist() == pytest.approx([ratio - mean + (1 - target) for ratio in ratios], abs=1e-12)
    assert float(found.mean()) == pytest.approx(1 - target, abs=1e-12)


def test_equal_outliers_are_uniform() -> None:
    assert keep_ratios(torch.full((5,), 3.7, dtype=torch.float64), 0.7, 0.08).tolist() == [1 - 0.7] * 5
    assert kept_of_group(torch.full((5,), 3.7, dtype=torch.float64), 0.625, 8, 2.0) == [3] * 5


@given(shares, st.integers(2, 16), st.floats(0, 4), st.data())
def test_mixed_patterns_follow_the_formula(
    outliers: list[float], group: int, lambda_: float, data: st.DataObject
) -> None:
    pruned = data.draw(st.integers(0, group - 1))
    low, high = min(outliers), max(outliers)
    raw = [(value - low) / (high - low) * lambda_ if high > low else 0.0 for value in outliers]
    mean = np.mean(raw)
    expected = [group - (pruned - int(np.round(value - mean))) for value in raw]
    values = torch.tensor(outliers, dtype=torch.float64)
    if all(1 <= kept <= group for kept in expected):
        assert kept_of_group(values, pruned / group, group, lambda_) == expected
    else:
        with pytest.raises(OptionError, match="lower --lambda"):
            kept_of_group(values, pruned / group, group, lambda_)


def test_a_layer_that_would_keep_nothing_is_named() -> None:
    with pytest.raises(OptionError, match=r"--group 4, --sparsity 0\.75 and --lambda 4 decoder layer 0 would keep -1"):
        kept_of_group(torch.tensor([0.0, 1.0], dtype=torch.float64), 0.75, 4, 4.0)
