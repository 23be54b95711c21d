"""The last step: onto the target in exact mode, untouched but for the floor in reference mode."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimcli.methods.layers.projection import settle, uniform, weighted_mean


@given(
    st.lists(st.tuples(st.floats(-0.5, 1.5), st.integers(1, 10_000)), min_size=1, max_size=20),
    st.floats(0, 0.999),
)
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


def test_uniform_is_the_target_to_the_last_bit() -> None:
    assert uniform(3, 0.7).tolist() == [0.7] * 3
