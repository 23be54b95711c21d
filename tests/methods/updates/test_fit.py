"""CG and ADMM: against least squares row by row, exact counts, and what they are for: smaller errors."""

import pytest
import torch
from torch import Tensor

from trimcli.errors import OptionError
from trimcli.methods import masks
from trimcli.methods.choice import Choice, Target
from trimcli.methods.recipe import Recipe
from trimcli.methods.scores import SCORES
from trimcli.methods.stats import FITTING, LinearStats
from trimcli.methods.updates.cg import FitOptions
from trimcli.methods.updates.cg_solver import fitted


def problem(seed: int = 0, d_out: int = 12, d_in: int = 24, tokens: int = 200) -> tuple[Tensor, LinearStats]:
    """A weight, and the statistics of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_in, d_in, generator=generator) / d_in**0.5 + torch.eye(d_in)
    inputs = torch.randn(tokens, d_in, generator=generator) @ mixing * (torch.rand(d_in, generator=generator) * 3 + 0.2)
    gram = 2 * inputs.T @ inputs / 4
    samples = inputs.view(4, -1, d_in)[:, -1].T.contiguous()
    stats = LinearStats(fitting=gram, heldout=gram, sqnorm=inputs.square().sum(dim=0) / 4, inputs=samples)
    return torch.randn(d_out, d_in, generator=generator), stats


def error(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    gap = (found - weight).double()
    return float((gap @ gram.double() * gap).sum())


def exact(weight: Tensor, keep: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """Row by row by a dense solver in float64."""
    metric = gram.double() + ridge * gram.diagonal().double().mean() * torch.eye(len(gram), dtype=torch.float64)
    result = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(keep):
        right = (metric @ weight[row].double())[kept]
        result[row, kept] = torch.linalg.solve(metric[kept][:, kept], right)
    return result


@pytest.mark.parametrize("ridge", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("kept", [0, 1, 8, 23, 24])
def test_cg_ends_at_each_rows_least_squares(kept: int, ridge: float) -> None:
    weight, stats = problem()
    keep = masks.lowest_per_row(
        torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)), torch.full((12,), 24 - kept)
    )
    found = fitted(weight, keep, stats[FITTING], ridge=ridge, steps=200)
    torch.testing.assert_close(found.double(), exact(weight, keep, stats[FITTING], ridge), rtol=1e-3, atol=1e-3)
    assert not found[~keep].any()


def test_every_step_of_cg_is_no_worse() -> None:
    weight, stats = problem()
    gram, keep = stats[FITTING], masks.lowest_overall(weight.abs(), 0.6, "exact")
    found = [fitted(weight, keep, gram, ridge=1e-6, steps=steps) for steps in (1, 2, 4, 8)]
    errors = [error(weight, one, gram) for one in found]
    assert error(weight, weight * keep, gram) > errors[0]
    assert errors == sorted(errors, reverse=True)


def test_channels_that_never_fire_do_no_harm() -> None:
    weight, stats = problem()
    gram = stats[FITTING].clone()
    gram[:, 3] = gram[3] = 0
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep[:, ::2] = False
    found = fitted(weight, keep, gram, ridge=0.01, steps=100)
    torch.testing.assert_close(found.double(), exact(weight, keep, gram, 0.01), rtol=1e-3, atol=1e-3)
    assert torch.isfinite(fitted(weight, keep, torch.zeros_like(gram), ridge=0.01, steps=5)).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight, stats = problem()
    with pytest.raises(ValueError, match="do not fit"):
        fitted(weight, torch.ones(3, 3, dtype=torch.bool), stats[FITTING], ridge=0.01, steps=3)


@pytest.mark.parametrize("rows", ["even", "trim", "free"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.7, 0.95])
def test_admm_takes_what_the_rows_budget_says(rows: str, sparsity: float) -> None:
    weight, stats = problem()
    plain = Recipe(rows=rows).choose(weight, stats, Target(sparsity))
    found = Recipe(method="admm", rows=rows).choose(weight, stats, Target(sparsity))
    assert found.weight is not None
    assert int((~found.keep).sum()) == masks.matrix_budget(12, 24, sparsity)
    if rows != "free":
        assert torch.equal(found.keep.sum(dim=1), plain.keep.sum(dim=1))
    assert not found.weight[~found.keep].any()


def test_admm_keeps_n_of_m() -> None:
    weight, stats = problem()
    found = Recipe(method="admm").choose(weight, stats, Target(0.5, (2, 4)))
    assert (found.keep.view(12, -1, 4).sum(dim=2) == 2).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", [Target(0.5), Target(0.7), Target(0.5, (2, 4))])
def test_each_of_them_betters_the_one_before(target: Target, seed: int) -> None:
    """Outputs come nearer to the dense ones from wanda to its best weights, and from these to ADMM's mask."""
    weight, stats = problem(seed, d_out=32, d_in=64)
    recipes = [Recipe(), Recipe(update="cg"), Recipe(method="admm")]
    found = [recipe.choose(weight, stats, target) for recipe in recipes]
    values = [weight * one.keep if one.weight is None else one.weight for one in found]
    errors = [error(weight, one, stats[FITTING]) for one in values]
    assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2]


def test_free_rows_lose_the_lowest_of_the_matrix() -> None:
    weight, stats = problem()
    found = Recipe(rows="free").choose(weight, stats, Target(0.6))
    scores = SCORES["wanda"](weight, stats)
    assert torch.equal(found.keep, masks.lowest_overall(scores, 0.6, "exact"))


def test_weights_that_go_in_any_case_are_never_kept() -> None:
    weight, stats = problem()
    free = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) > 0.3
    choice = Choice(SCORES["wanda"], stats, Target(0.5), free=free)
    for share in (0.2, 1.0):
        keep = choice.of_scores(weight.abs(), share)
        assert not keep[~free].any()
    for recipe in (Recipe(update="cg"), Recipe(method="admm")):
        found = recipe.choose(weight * free, stats, Target(0.5), keep_zeros=True)
        assert found.weight is not None
        assert not found.weight[~free].any()


@pytest.mark.parametrize("ridge", [0.0, 1e39])
def test_a_ridge_of_nothing_or_beyond_all_is_refused(ridge: float) -> None:
    with pytest.raises(OptionError, match=rf"--ridge {ridge:g} must be a positive number".replace("+", r"\+")):
        FitOptions(ridge=ridge)


def test_admm_bears_as_many_steps_as_asked_for() -> None:
    weight, stats = problem()
    found = Recipe(method="admm", options=(FitOptions(admm_steps=2000),)).choose(weight, stats, Target(0.5))
    assert found.weight is not None
    assert torch.isfinite(found.weight).all()
    assert int((~found.keep).sum()) == masks.matrix_budget(12, 24, 0.5)


@pytest.mark.parametrize("seed", range(10))
def test_admm_is_never_worse_than_the_mask_in_whose_place_it_comes(seed: int) -> None:
    """On held-out samples, though there are few others, and its rows share what goes otherwise."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, 64, generator=generator)
    scale = torch.randn(64, generator=generator).exp()
    inputs, held = (torch.randn(count, 64, generator=generator) * scale for count in (24, 8))
    stats = LinearStats(fitting=inputs.T @ inputs, heldout=held.T @ held, sqnorm=inputs.square().sum(dim=0))
    found, plain = (recipe.choose(weight, stats, Target(0.5)) for recipe in (Recipe(method="admm"), Recipe()))
    assert found.weight is not None
    assert error(weight, found.weight, held.T @ held) <= error(weight, weight * plain.keep, held.T @ held) * (1 + 1e-5)
    if not found.judged[-1].better:
        assert torch.equal(found.keep, plain.keep)


@pytest.mark.parametrize("fields", [{"update": "cg"}, {"method": "admm"}])
def test_weights_that_held_out_samples_speak_against_stay_as_they_were(fields: dict[str, str]) -> None:
    """Fitted, what stays makes up for a channel that goes along with it; held out, the two are opposed."""
    weight, stats = problem()
    correlated = torch.full((24, 24), 0.9) + 0.1 * torch.eye(24)
    signs = torch.ones(24)
    signs[::2] = -1
    opposed = correlated * signs * signs.unsqueeze(1)
    weight = weight.abs() + 0.1
    stats = LinearStats(fitting=correlated, heldout=opposed, sqnorm=torch.ones(24))
    found = Recipe(**fields).choose(weight, stats, Target(0.5))  # type: ignore[arg-type]
    assert found.weight is not None
    assert torch.equal(found.weight, weight * found.keep)
    assert torch.equal(found.keep, Recipe().choose(weight, stats, Target(0.5)).keep)
    (judged,) = found.judged
    assert judged.step == next(iter(fields.values()))
    assert judged.before == pytest.approx(error(weight, found.weight, opposed) / error(0 * weight, weight, opposed))
    assert judged.after > judged.before
    for heldout in (correlated, torch.zeros(24, 24)):
        moved = Recipe(**fields).choose(weight, stats.with_(heldout=heldout), Target(0.5))  # type: ignore[arg-type]
        assert moved.weight is not None
        assert not torch.equal(moved.weight, weight * moved.keep)
        assert moved.judged[0].better
