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

from tests.layer_survey import MadeSurvey
from trimcli.errors import OptionError
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.layers.owl import OwlOptions, keep_ratios, kept_of_group, outlier_share
from trimcli.methods.scores import wanda

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
            gc.collect(1)
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


@pytest.mark.parametrize("special", [False, True])
@given(shares, st.integers(2, 16), st.floats(0, 4), st.data())
def test_mixed_patterns_follow_the_formula(
    special: bool, outliers: list[float], group: int, lambda_: float, data: st.DataObject
) -> None:
    pruned = data.draw(st.integers(0, group - 1))
    low, high = min(outliers), max(outliers)
    raw = [(value - low) / (high - low) * lambda_ if high > low else 0.0 for value in outliers]
    mean = np.mean(raw)
    offsets = [int(np.round(value - mean)) for value in raw]
    if special:  # prune_wanda_outlier_structure_special: an offset of exactly 1 counts as 2
        offsets = [2 if offset == 1 else offset for offset in offsets]
    expected = [group - (pruned - offset) for offset in offsets]
    values = torch.tensor(outliers, dtype=torch.float64)
    if all(1 <= kept <= group for kept in expected):
        assert kept_of_group(values, pruned / group, group, lambda_, special=special) == expected
    else:
        with pytest.raises(OptionError, match="lower --lambda"):
            kept_of_group(values, pruned / group, group, lambda_, special=special)


def test_the_special_form_moves_only_those_that_would_keep_one_more() -> None:
    outliers = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    assert kept_of_group(outliers, 0.5, 16, 6.0) == [5, 6, 7, 8, 9, 10, 11]
    assert kept_of_group(outliers, 0.5, 16, 6.0, special=True) == [5, 6, 7, 8, 10, 10, 11]
    with pytest.raises(OptionError, match=r"decoder layer 1 would keep 5 of 4"):
        kept_of_group(torch.tensor([0.0, 2.0]).double(), 0.25, 4, 2.0, special=True)
    assert kept_of_group(torch.tensor([0.0, 2.0]).double(), 0.25, 4, 2.0) == [2, 4]


def test_the_special_form_is_of_mixed_patterns() -> None:
    with pytest.raises(OptionError, match="--special does nothing without --group"):
        OwlOptions(special=True)
    assert OwlOptions(special=True, group=8).special


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lambda_": -0.1}, "--lambda -0.1 is not usable"),
        ({"lambda_": float("nan")}, "--lambda nan is not usable"),
        ({"lambda_": float("inf")}, "--lambda inf is not usable"),
        ({"hyper_m": -1.0}, "--hyper-m -1 is not usable"),
        ({"group": 1}, "--group 1 must be at least 2"),
    ],
)
def test_options_that_cannot_be_used(fields: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        OwlOptions(**fields)  # type: ignore[arg-type]


LAYERS = [["a", "b"], ["c"], ["d", "e"]]
LINEARS = {"a": (6, 8), "b": (4, 8), "c": (10, 8), "d": (3, 16), "e": (16, 8)}


def outliers_of(survey: MadeSurvey, hyper_m: float) -> list[float]:
    """D of every decoder layer, from a loop over its scores."""
    found = []
    for layer in survey.layers:
        scores = [
            float(value)
            for name in layer
            for value in (survey.weights[name].abs() * survey.norms[name].sqrt()).flatten()
        ]
        threshold = hyper_m * statistics.fmean(scores)
        found.append(100 * sum(score > threshold for score in scores) / len(scores))
    return found


def test_the_allocation_is_the_formula_on_wanda_scores() -> None:
    survey = MadeSurvey(LAYERS, LINEARS)
    found = ALLOCATIONS["owl"](survey, 0.6, options=OwlOptions(lambda_=0.1, hyper_m=1.5))
    outliers = outliers_of(survey, 1.5)
    kept = keep_ratios(torch.tensor(outliers, dtype=torch.float64), 0.6, 0.1).tolist()
    sizes = [2, 1, 2]
    assert len(set(outliers)) == 3
    assert found.sparsity.tolist() == pytest.approx(
        [1 - ratio for ratio, size in zip(kept, sizes, strict=True) for _ in range(size)]
    )
    assert found.metric == pytest.approx(
        [value for value, size in zip(outliers, sizes, strict=True) for _ in range(size)]
    )
    assert found.parameters == {"lambda": 0.1, "hyper_m": 1.5}
    assert found.pattern is None
    assert {name for kind, name in survey.asked if kind == "weight"} == set(LINEARS)
    assert wanda(survey.weights["a"], survey.stats("a")).shape == (6, 8)


@pytest.mark.parametrize("special", [False, True])
def test_the_allocation_of_mixed_patterns(special: bool) -> None:
    survey = MadeSurvey(LAYERS, LINEARS)
    options = OwlOptions(lambda_=2.0, hyper_m=1.5, group=8, special=special)
    found = ALLOCATIONS["owl"](survey, 0.5, options=options)
    outliers = torch.tensor(outliers_of(survey, 1.5), dtype=torch.float64)
    kept = kept_of_group(outliers, 0.5, 8, 2.0, special=special)
    spread = [count for count, layer in zip(kept, LAYERS, strict=True) for _ in layer]
    assert len(set(kept)) > 1
    assert (2 in {count - 4 for count in kept}) == special
    assert found.pattern == [(count, 8) for count in spread]
    assert found.sparsity.tolist() == [1 - count / 8 for count in spread]
    expected: dict[str, object] = {"lambda": 2.0, "hyper_m": 1.5, "group": 8}
    assert found.parameters == expected | ({"special": True} if special else {})


def test_groups_that_do_not_divide_the_inputs_are_named_before_anything_is_read() -> None:
    survey = MadeSurvey(LAYERS, {**LINEARS, "d": (3, 12)})
    with pytest.raises(OptionError, match="--group 8 does not divide the 12 inputs of d"):
        ALLOCATIONS["owl"](survey, 0.5, options=OwlOptions(group=8))
    assert survey.asked == []


def test_imported_keep_ratios_need_no_weights() -> None:
    survey = MadeSurvey(LAYERS, LINEARS, torch.tensor([0.5, 0.4, 0.2], dtype=torch.float64))
    found = ALLOCATIONS["owl"](survey, 0.6)
    assert found.sparsity.tolist() == [0.5, 0.5, 0.6, 0.8, 0.8]
    assert found.metric == [None] * 5
    assert survey.asked == []


def test_a_layer_that_would_keep_nothing_is_named() -> None:
    with pytest.raises(OptionError, match=r"--group 4, --sparsity 0\.75 and --lambda 4 decoder layer 0 would keep -1"):
        kept_of_group(torch.tensor([0.0, 1.0], dtype=torch.float64), 0.75, 4, 4.0)
