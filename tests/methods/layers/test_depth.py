"""The straight line from the first decoder layer to the last."""

import pytest

from tests.layer_survey import MadeSurvey
from trimcli.errors import OptionError
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.layers.depth import DepthOptions


def test_layers_lie_on_a_line_through_the_target() -> None:
    shapes = {"a.0.x": (4, 6), "a.0.y": (3, 6), "a.1.x": (5, 8), "a.2.x": (2, 6)}
    survey = MadeSurvey([["a.0.x", "a.0.y"], ["a.1.x"], ["a.2.x"]], shapes)
    found = ALLOCATIONS["depth"](survey, 0.7, options=DepthOptions(depth_width=0.12))
    assert found.sparsity.tolist() == pytest.approx([0.58, 0.58, 0.7, 0.82])
    assert found.metric == [None] * 4
    assert not survey.asked


def test_one_layer_has_the_target() -> None:
    survey = MadeSurvey([["a.0.x", "a.0.y"]], {"a.0.x": (4, 6), "a.0.y": (3, 6)})
    assert ALLOCATIONS["depth"](survey, 0.7).sparsity.tolist() == [0.7, 0.7]


def test_a_negative_width_is_refused() -> None:
    with pytest.raises(OptionError, match="--depth-width -1 is not usable"):
        DepthOptions(depth_width=-1.0)
