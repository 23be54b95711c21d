"""The allocation that is kept of those tried."""

import pytest
import torch

from tests.layer_survey import MadeSurvey
from trimcli.errors import OptionError
from trimcli.methods.layers.auto import CHEAP, AutoOptions
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.layers.projection import settle

LAYERS = [["a.0.x", "a.0.y"], ["a.1.x"], ["a.2.x"]]
SHAPES = {"a.0.x": (4, 6), "a.0.y": (3, 6), "a.1.x": (5, 8), "a.2.x": (2, 6)}


def made() -> MadeSurvey:
    """With outliers, so that no two of the allocations are alike."""
    survey = MadeSurvey(LAYERS, SHAPES)
    survey.weights = {name: weight**5 for name, weight in survey.weights.items()}
    return survey


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).square().sum())


def proposals(survey: MadeSurvey) -> dict[str, torch.Tensor]:
    return {name: settle(ALLOCATIONS[name](survey, 0.6).sparsity, survey.counts, 0.6, "exact") for name in CHEAP}


@pytest.mark.parametrize("wanted", CHEAP)
def test_the_lowest_loss_is_kept(wanted: str) -> None:
    survey = made()
    known = proposals(survey)
    survey.loss = lambda one, sample: far(one, known[wanted]) + sample
    found = ALLOCATIONS["auto"](survey, 0.6, options=AutoOptions(trial_samples=5))
    assert found.parameters["chosen"] == wanted
    losses = found.parameters["losses"]
    assert list(losses.values()) == sorted(losses.values())
    for name, one in known.items():
        assert losses[name] == pytest.approx(far(one, known[wanted]) + 9)
    assert torch.equal(found.sparsity, known[wanted])
    assert found.metric == ALLOCATIONS[wanted](survey, 0.6).metric
    assert {(samples.start, samples.stop) for _, samples in survey.tried} == {(7, 12)}


def test_the_best_is_tried_flatter_steeper_and_blended() -> None:
    survey = made()
    known = proposals(survey)
    survey.loss = lambda one, sample: far(one, 0.6 + 1.6 * (known["depth"] - 0.6))
    found = ALLOCATIONS["auto"](survey, 0.6)
    assert found.parameters["chosen"] == "depth x1.5"
    steeper = settle(0.6 + 1.5 * (known["depth"] - 0.6), survey.counts, 0.6, "exact")
    torch.testing.assert_close(found.sparsity, steeper)
    second = min((name for name in CHEAP if name != "depth"), key=lambda name: found.parameters["losses"][name])
    expected = {*CHEAP, "depth x0.5", "depth x1.5", "depth x2", f"depth + {second}"}
    assert set(found.parameters["losses"]) == expected
    blend = settle((known["depth"] + known[second]) / 2, survey.counts, 0.6, "exact")
    assert any(torch.allclose(candidate, blend) for candidate, _ in survey.tried)


def test_only_what_is_named_is_tried_on_what_there_is() -> None:
    survey = MadeSurvey(LAYERS, SHAPES)
    found = ALLOCATIONS["auto"](survey, 0.6, options=AutoOptions(auto_methods=("dlp", "uniform"), trial_samples=99))
    blended = {"dlp + uniform", "uniform + dlp"}
    assert blended & set(found.parameters["losses"])
    named = {name.split(" x")[0] for name in found.parameters["losses"]} - blended
    assert named == {"dlp", "uniform"}
    assert found.parameters["trial_samples"] == 12
    assert {samples.stop - samples.start for _, samples in survey.tried} == {12}


@pytest.mark.parametrize(
    ("tried", "message"),
    [
        (("owll",), "--auto-methods 'owll' is none of uniform, owl, dlp, alpha, error, depth; did you mean 'owl'"),
        (("auto",), "--auto-methods 'auto' is none of"),
        (("search",), "--auto-methods 'search' is none of"),
        ((), "--auto-methods names nothing to try"),
    ],
)
def test_what_cannot_be_tried_is_refused(tried: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AutoOptions(auto_methods=tried)


def test_samples_are_refused_below_one() -> None:
    with pytest.raises(OptionError, match="--trial-samples 0 must be at least 1"):
        AutoOptions(trial_samples=0)
