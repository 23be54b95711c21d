"""The search on losses that are known: it comes nearer to their optimum, and never ends worse than it began."""

import pytest
import torch
from torch import Tensor

from tests.layer_survey import MadeSurvey
from trimcli.errors import OptionError
from trimcli.methods.layers.base import ALLOCATIONS, Allocation
from trimcli.methods.layers.projection import settle, weighted_mean
from trimcli.methods.layers.search import SearchOptions

LAYERS = [["a.0.x", "a.0.y"], ["a.1.x", "a.1.y"], ["a.2.x", "a.2.y"]]
SHAPES = {f"a.{layer}.{part}": (4, 6) if part == "x" else (9, 5) for layer in range(3) for part in "xy"}
OPTIMUM = torch.tensor([0.45, 0.75, 0.4, 0.7, 0.5, 0.55], dtype=torch.float64)


def made(seed: int = 3) -> MadeSurvey:
    survey = MadeSurvey(LAYERS, SHAPES)
    survey.seed = seed
    survey.loss = lambda one, sample: float((one - OPTIMUM).square().sum()) + sample
    return survey


def searched(survey: MadeSurvey, **own: float) -> Allocation:
    found = ALLOCATIONS["search"](survey, 0.6, options=SearchOptions(search_samples=4, **own))  # type: ignore[arg-type]
    assert isinstance(found, Allocation)
    return found


def distance(sparsity: Tensor) -> float:
    return float((sparsity - OPTIMUM).square().sum())


def test_it_ends_near_the_optimum_with_the_target_kept() -> None:
    survey = made()
    found = searched(survey)
    nearest = settle(OPTIMUM, survey.counts, 0.6, "exact")
    losses, heldout = found.parameters["losses"], found.parameters["heldout"]
    assert losses["found"] == pytest.approx(distance(found.sparsity) + 1.5)
    assert heldout["found"] == pytest.approx(distance(found.sparsity) + 9.5)
    assert distance(found.sparsity) < distance(nearest) + 0.1 * (losses["start"] - 1.5 - distance(nearest))
    assert weighted_mean(found.sparsity, survey.counts) == pytest.approx(0.6, abs=1e-9)
    start = min(distance(candidate) for candidate, _ in survey.tried[:9])
    assert losses["start"] == pytest.approx(start + 1.5)
    assert found.parameters["kept"] == "found"


@pytest.mark.parametrize("evaluations", [9, 10, 17, 18, 60])
def test_it_tries_as_many_as_asked_for_and_checks_two(evaluations: int) -> None:
    survey = made()
    searched(survey, search_evaluations=evaluations)
    asked = [samples for _, samples in survey.tried]
    assert asked == [slice(0, 4)] * evaluations + [slice(8, 12)] * 2
    for candidate, _ in survey.tried:
        assert weighted_mean(candidate, survey.counts) == pytest.approx(0.6, abs=1e-9)
        assert 0 <= float(candidate.min()) <= float(candidate.max()) <= 0.99


@pytest.mark.parametrize(("samples", "fit", "check"), [(6, (0, 3), (3, 6)), (3, (0, 1), (2, 3)), (1, (0, 1), (0, 1))])
def test_few_samples_are_shared_between_trying_and_checking(
    samples: int, fit: tuple[int, int], check: tuple[int, int]
) -> None:
    survey = made()
    survey.samples = samples
    searched(survey, search_evaluations=9)
    asked = [samples for _, samples in survey.tried]
    assert asked == [slice(*fit)] * 9 + [slice(*check)] * 2


def test_the_seed_is_all_that_chance_has() -> None:
    assert torch.equal(searched(made()).sparsity, searched(made()).sparsity)
    assert not torch.equal(searched(made()).sparsity, searched(made(seed=4)).sparsity)


def test_what_is_no_better_on_held_out_samples_is_not_kept() -> None:
    survey = made()
    first: list[Tensor] = []

    def loss(one: Tensor, sample: int) -> float:
        return distance(one) if sample < 8 or not first else float((one - first[0]).square().sum())

    survey.loss = loss
    searched(survey, search_evaluations=9)
    first.append(min((candidate for candidate, _ in survey.tried[:9]), key=distance))
    found = searched(survey)
    assert found.parameters["kept"] == "start"
    assert found.parameters["heldout"]["found"] > found.parameters["heldout"]["start"] == 0
    assert found.parameters["losses"]["found"] < found.parameters["losses"]["start"]
    assert torch.equal(found.sparsity, first[0])


def test_one_matrix_leaves_nothing_to_move() -> None:
    survey = MadeSurvey([["a.0.x"]], {"a.0.x": (4, 6)})
    assert searched(survey).sparsity.tolist() == [0.6]


def test_options_that_are_refused() -> None:
    with pytest.raises(OptionError, match="--search-evaluations 8 must be at least 9"):
        SearchOptions(search_evaluations=8)
    with pytest.raises(OptionError, match="--search-samples 0 must be at least 1"):
        SearchOptions(search_samples=0)
    with pytest.raises(OptionError, match="--search-step 0 must be a positive number"):
        SearchOptions(search_step=0.0)
