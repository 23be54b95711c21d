"""The error allocation against a slow loop."""

import pytest
import torch

from tests.layer_survey import MadeSurvey
from trimcli.errors import OptionError
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.layers.error import ErrorOptions
from trimcli.methods.layers.projection import settle, weighted_mean

LAYERS = [["a.0.x", "a.0.y"], ["a.1.x"], ["a.2.x"]]
SHAPES = {"a.0.x": (4, 6), "a.0.y": (3, 6), "a.1.x": (5, 8), "a.2.x": (2, 7)}


def suffered(weight: list[list[float]], sqnorm: list[float], total: int) -> float:
    """What the output's square norm loses when every row loses its lowest, the first rows one more."""
    lost = whole = 0.0
    each, extra = divmod(total, len(weight))
    for row, values in enumerate(weight):
        terms = sorted(value * value * norm for value, norm in zip(values, sqnorm, strict=True))
        lost += sum(terms[: each + (row < extra)])
        whole += sum(terms)
    return lost / whole


def test_matrices_follow_the_formula_each_by_itself() -> None:
    survey = MadeSurvey(LAYERS, SHAPES)
    found = ALLOCATIONS["error"](survey, 0.6, options=ErrorOptions(error_alpha=0.15))
    errors = [
        suffered(survey.weights[name].tolist(), survey.norms[name].tolist(), round(0.6 * d_out * d_in))
        for name, (d_out, d_in) in SHAPES.items()
    ]
    assert len(set(errors)) == 4
    assert found.metric == pytest.approx(errors, rel=1e-5)
    low, high = min(errors), max(errors)
    widths = [(value - low) / (high - low) * 0.3 for value in errors]
    assert found.sparsity.tolist() == pytest.approx([0.6 - (width - sum(widths) / 4) for width in widths], rel=1e-4)
    assert found.parameters == {"error_alpha": 0.15}
    settled = settle(found.sparsity, survey.counts, 0.6, "exact")
    assert weighted_mean(settled, survey.counts) == pytest.approx(0.6, abs=1e-12)


def test_matrices_that_are_alike_are_pruned_alike() -> None:
    survey = MadeSurvey(LAYERS, SHAPES)
    survey.weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert ALLOCATIONS["error"](survey, 0.6).sparsity.tolist() == [0.6] * 4


def test_a_negative_width_is_refused() -> None:
    with pytest.raises(OptionError, match="--error-alpha -1 is not usable"):
        ErrorOptions(error_alpha=-1.0)
