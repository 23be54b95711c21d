"""The last step: onto the target in exact mode, untouched but for the floor in reference mode."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.layer_survey import MadeSurvey
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.layers.projection import settle, weighted_mean
from trimcli.options import Numerics


@given(st.lists(st.tuples(st.floats(-0.5, 1.5), st.integers(1, 10_000)), min_size=1, max_size=20), st.floats(0, 0.999))
def test_exact_hits_the_target_within_bounds(linears: list[tuple[float, int]], target: float) -> None:
    sparsity = torch.tensor([value for value, _ in linears], dtype=torch.float64)
    weights = torch.tensor([count for _, count in linears], dtype=torch.float64)
    found = settle(sparsity, weights, target, "exact")
    assert float(found.min()) >= 0
    assert float(found.max()) <= max(0.99, target)
    assert weighted_mean(found, weights) == pytest.approx(target, abs=1e-12)
    inside = (found > 0) & (found < max(0.99, target))
    shifts = (found - sparsity)[inside]
    if len(shifts) > 1:
        assert float(shifts.max() - shifts.min()) < 1e-12


def test_reference_moves_nothing_but_what_is_not_positive() -> None:
    sparsity = torch.tensor([-0.2, 0.0, 0.3, 0.9999, 1.2], dtype=torch.float64)
    assert settle(sparsity, torch.ones(5), 0.7, "reference").tolist() == [0.01, 0.01, 0.3, 0.9999, 1.2]


@pytest.mark.parametrize("numerics", ["exact", "reference"])
@pytest.mark.parametrize("target", [0.0, 0.1, 1 / 3, 0.7, 0.995])
def test_uniform_is_the_target_to_the_last_bit(target: float, numerics: Numerics) -> None:
    survey = MadeSurvey([["a", "b"], ["c"]], {"a": (3, 7), "b": (5, 2), "c": (2, 9)})
    found = ALLOCATIONS["uniform"](survey, target)
    assert found.target == target
    assert found.sparsity.tolist() == [target] * 3
    assert found.sparsity.dtype == torch.float64
    assert (found.metric, found.parameters, found.pattern) == ([None] * 3, {}, None)
    assert (
        settle(found.sparsity, survey.counts, target, numerics).tolist()
        == ([target or 0.01] if numerics == "reference" else [target]) * 3
    )
    assert weighted_mean(found.sparsity, survey.counts) == pytest.approx(target, abs=1e-15)
