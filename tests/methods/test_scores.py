"""Scores against their formulas, and their registry."""

import pytest
import torch

from trimcli import registry
from trimcli.errors import OptionError
from trimcli.methods.scores import SCORES, magnitude, score, wanda
from trimcli.methods.stats import GRAM, SQNORM, LinearStats


def test_wanda_is_magnitude_times_input_norm() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 0.0, 0.5]])
    sqnorm = torch.tensor([4.0, 9.0, 0.0])
    entry = SCORES["wanda"]
    expected = [[2.0, 6.0, 0.0], [8.0, 0.0, 0.0]]
    assert entry(weight, LinearStats(sqnorm=sqnorm)).tolist() == expected
    assert wanda(weight, LinearStats(sqnorm=sqnorm)).tolist() == expected
    assert entry.needs == {"sqnorm"} == {SQNORM.name}
    assert entry.compare == "row"
    assert "Sun et al. 2023" in entry.source
    assert entry.help == "Weight magnitude times input norm."


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_scores_are_float32_and_leave_the_weight_alone(name: str, dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, -2.0], [-3.0, 0.5]], dtype=dtype)
    before = weight.clone()
    scores = SCORES[name](weight, LinearStats(sqnorm=torch.ones(2)))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[1.0, 2.0], [3.0, 0.5]]
    assert torch.equal(weight, before)


def test_magnitude_needs_nothing() -> None:
    entry = SCORES["magnitude"]
    assert entry.needs == frozenset()
    assert entry.compare == "matrix"
    assert entry(torch.tensor([[-1.0]]), LinearStats()).tolist() == [[1.0]]
    assert magnitude(torch.tensor([[-1.0]]), LinearStats()).tolist() == [[1.0]]


def test_a_statistic_that_was_not_collected_is_named() -> None:
    with pytest.raises(ValueError, match="'sqnorm' was not collected"):
        SCORES["wanda"](torch.ones(2, 2), LinearStats(gram=torch.eye(2)))


def test_unknown_score_names_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"'wander' is none of wanda, magnitude, obs; did you mean 'wanda'"):
        SCORES["wander"]
    assert list(SCORES)[:3] == ["wanda", "magnitude", "obs"]


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="a score named 'wanda' is registered already"):
        score("wanda", source="nowhere", compare="row")(lambda weight, _stats: weight)


def test_a_score_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCORES, "_entries", dict(SCORES._entries))
    monkeypatch.setattr(registry, "_everything", list(registry._everything))

    @score("trace", needs={GRAM}, source="Nobody 2030, section 1", compare="matrix")
    def trace(weight: torch.Tensor, stats: LinearStats) -> torch.Tensor:
        """Weight times trace.

        More that help does not show.
        """
        return weight * stats.gram.trace()

    entry = SCORES["trace"]
    assert entry.needs == {"gram"}
    assert (entry.title, entry.help) == ("trace", "Weight times trace.")
    assert entry(torch.ones(1, 2), LinearStats(gram=torch.eye(2))).tolist() == [[2.0, 2.0]]
    assert list(SCORES)[-1] == "trace"
