"""Scores against their formulas, and the registry."""

import pytest
import torch

from trimcli.errors import OptionError
from trimcli.methods.scores import LinearStats, Statistic, register_score, score_function, score_names


def test_wanda_is_magnitude_times_input_norm() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 0.0, 0.5]])
    sqnorm = torch.tensor([4.0, 9.0, 0.0])
    wanda = score_function("wanda")
    expected = [[2.0, 6.0, 0.0], [8.0, 0.0, 0.0]]
    assert wanda(weight, LinearStats(sqnorm=sqnorm)).tolist() == expected
    assert wanda.needs == {Statistic.SQNORM}
    assert "Sun et al. 2023" in wanda.source


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_scores_are_float32_and_leave_the_weight_alone(name: str, dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, -2.0], [-3.0, 0.5]], dtype=dtype)
    before = weight.clone()
    scores = score_function(name)(weight, LinearStats(sqnorm=torch.ones(2)))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[1.0, 2.0], [3.0, 0.5]]
    assert torch.equal(weight, before)


def test_magnitude_needs_nothing() -> None:
    magnitude = score_function("magnitude")
    assert magnitude.needs == frozenset()
    assert magnitude(torch.tensor([[-1.0]]), LinearStats()).tolist() == [[1.0]]


def test_a_statistic_that_was_not_collected_is_named() -> None:
    with pytest.raises(ValueError, match="'sqnorm' was not collected"):
        score_function("wanda")(torch.ones(2, 2), LinearStats(gram=torch.eye(2)))


def test_unknown_score_names_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"'wander'.*magnitude, wanda"):
        score_function("wander")
    assert score_names()[:2] == ["magnitude", "wanda"]


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'wanda' is registered already"):
        register_score("wanda", source="nowhere")(lambda weight, _stats: weight)
