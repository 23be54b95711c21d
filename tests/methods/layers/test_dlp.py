"""DLP against the formula, and the median of what is never together in memory."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.layer_survey import MadeSurvey
from trimcli.errors import OptionError
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.layers.dlp import DlpOptions, median_of
from trimcli.methods.scores import wanda


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0, 2.0**90, width=32), min_size=1, max_size=9), min_size=1, max_size=4))
def test_the_median_is_that_of_all_together(matrices: list[list[float]]) -> None:
    everything = [value for matrix in matrices for value in matrix]
    found = median_of(lambda: [torch.tensor([matrix], dtype=torch.float32) for matrix in matrices])
    assert found == statistics.median_low(everything)


def test_layers_follow_the_formula() -> None:
    layers = [["a.0.x", "a.0.y"], ["a.1.x"], ["a.2.x"]]
    shapes = {"a.0.x": (4, 6), "a.0.y": (3, 6), "a.1.x": (5, 8), "a.2.x": (2, 6)}
    survey = MadeSurvey(layers, shapes)
    found = ALLOCATIONS["dlp"](survey, 0.6, options=DlpOptions(alpha=0.1))
    medians = []
    for layer in layers:
        scores = [wanda(survey.weights[name], survey.stats(name)).flatten() for name in layer]
        medians.append(statistics.median_low(torch.cat(scores).tolist()))
    importance = [1 - median / sum(medians) for median in medians]
    low, high = min(importance), max(importance)
    widths = [(value - low) / (high - low) * 0.2 for value in importance]
    expected = [0.6 - (width - sum(widths) / 3) for width in widths]
    assert found.sparsity.tolist() == pytest.approx([expected[0], expected[0], expected[1], expected[2]])
    assert found.metric == pytest.approx([importance[0], importance[0], importance[1], importance[2]])
    assert found.parameters == {"alpha": 0.1}


def test_layers_that_are_alike_are_pruned_alike() -> None:
    survey = MadeSurvey([["a.0.x"], ["a.1.x"]], {"a.0.x": (4, 6), "a.1.x": (4, 6)})
    survey.weights = dict.fromkeys(survey.weights, torch.zeros(4, 6))
    assert ALLOCATIONS["dlp"](survey, 0.6).sparsity.tolist() == [0.6, 0.6]


def test_a_negative_width_is_refused() -> None:
    with pytest.raises(OptionError, match="--dlp-alpha -1 is not usable"):
        DlpOptions(alpha=-1.0)
