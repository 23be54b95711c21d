"""What is done with one matrix, and which choices go together."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimcli import BarberOptions, Recipe, RowOptions, UpdateOptions
from trimcli.errors import OptionError
from trimcli.methods.masks import matrix_budget
from trimcli.methods.recipe import Target, check_patterns, expected_zeros, uniform_target
from trimcli.methods.scores import LinearStats, Statistic

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {},
    "variant": {"variant": True},
    "wanda + trim": {"rows": RowOptions()},
    "magnitude + trim": {"method": "magnitude", "rows": RowOptions(iterations=3)},
    "sparsegpt": {"method": "sparsegpt", "update": UpdateOptions(block_size=5)},
    "sparsegpt by wanda": {"method": "sparsegpt", "update": UpdateOptions(block_size=5, mask_score="wanda")},
    "sparsegpt once": {"method": "sparsegpt", "update": UpdateOptions(mask_update="once")},
    "sparsegpt + trim": {"method": "sparsegpt", "rows": RowOptions(iterations=3)},
}


def matrix(d_out: int, d_in: int, seed: int = 0) -> tuple[Tensor, LinearStats]:
    """A random weight [d_out, d_in] and its statistics over 6 samples of 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    x = torch.randn(6, 4, d_in, generator=generator)
    flat = x.reshape(-1, d_in)
    return weight, LinearStats(x.square().sum(dim=(0, 1)) / 6, x[:, -1].T.contiguous(), 2 / 6 * flat.T @ flat)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=12, deadline=None)
@given(
    d_out=st.integers(1, 12),
    d_in=st.integers(2, 17),
    sparsity=st.floats(0, 0.999, allow_nan=False),
    seed=st.integers(0, 99),
)
def test_exact_numerics_take_the_budget_to_the_weight(
    method: str, d_out: int, d_in: int, sparsity: float, seed: int
) -> None:
    weight, stats = matrix(d_out, d_in, seed)
    recipe, target = Recipe(**METHODS[method]), Target(sparsity)
    outcome = recipe.choose(weight, stats, target)
    budget = matrix_budget(d_out, d_in, sparsity)
    assert int((~outcome.keep).sum()) == budget == expected_zeros((d_out, d_in), target, recipe)
    assert (outcome.weight is not None) == (recipe.method == "sparsegpt")
    if outcome.weight is not None:
        assert not outcome.weight[~outcome.keep].any()
        assert bool(torch.isfinite(outcome.weight).all())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "sparsegpt by wanda", "sparsegpt once"])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (3, 8), (1, 2)])
def test_every_group_keeps_n_of_m(method: str, pattern: tuple[int, int]) -> None:
    fields = {**METHODS[method]}
    if "update" in fields:
        fields["update"] = UpdateOptions(mask_score=fields["update"].mask_score)
    weight, stats = matrix(6, 16)
    recipe, target = Recipe(**fields), Target(1 - pattern[0] / pattern[1], pattern)
    outcome = recipe.choose(weight, stats, target)
    assert bool((outcome.keep.unflatten(1, (-1, pattern[1])).sum(dim=2) == pattern[0]).all())
    assert int((~outcome.keep).sum()) == expected_zeros((6, 16), target, recipe)


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_that_keeps_all_leaves_the_matrix_whole(method: str) -> None:
    weight, stats = matrix(6, 16)
    outcome = Recipe(**METHODS[method]).choose(weight, stats, Target(0.0, (8, 8)))
    assert bool(outcome.keep.all())
    assert outcome.weight is None


@pytest.mark.parametrize("method", METHODS)
def test_what_goes_in_is_left_as_it_was(method: str) -> None:
    weight, stats = matrix(6, 16)
    before = [tensor.clone() for tensor in (weight, stats.sqnorm, stats.inputs, stats.gram) if tensor is not None]
    Recipe(**METHODS[method]).choose(weight, stats, Target(0.5))
    after = [tensor for tensor in (weight, stats.sqnorm, stats.inputs, stats.gram) if tensor is not None]
    assert len(before) == 4
    assert all(map(torch.equal, before, after))


def test_the_formulas() -> None:
    weight, stats = matrix(5, 8)
    wanda = weight.abs() * stats[Statistic.SQNORM].sqrt()
    keep = Recipe().choose(weight, stats, Target(0.5)).keep
    for row in range(5):
        assert set(keep[row].nonzero().flatten().tolist()) == set(wanda[row].argsort()[4:].tolist())
    keep = Recipe(method="magnitude").choose(weight, stats, Target(0.5)).keep
    assert torch.equal(keep, weight.abs() >= weight.abs().flatten().sort().values[20])


def test_half_precision_weights_are_scored_in_float32() -> None:
    weight, stats = matrix(5, 8)
    half = weight.half()
    assert torch.equal(
        Recipe().choose(half, stats, Target(0.5)).keep, Recipe().choose(half.float(), stats, Target(0.5)).keep
    )


def test_linears_that_share_a_gram_share_its_factor() -> None:
    weight, stats = matrix(5, 8)
    recipe = Recipe(method="sparsegpt")
    factors: dict[int, Any] = {}
    first = recipe.choose(weight, stats, Target(0.5), factors)
    second = recipe.choose(weight, stats, Target(0.5), factors)
    assert len(factors) == 1
    assert first.weight is not None
    assert second.weight is not None
    assert torch.equal(first.weight, second.weight)


def test_what_each_method_reads() -> None:
    needs = {name: {one.name for one in Recipe(**fields).needs} for name, fields in METHODS.items()}
    assert needs == {
        "magnitude": set(),
        "wanda": {"SQNORM"},
        "variant": {"SQNORM"},
        "wanda + trim": {"SQNORM", "INPUTS"},
        "magnitude + trim": {"INPUTS"},
        "sparsegpt": {"GRAM"},
        "sparsegpt by wanda": {"GRAM", "SQNORM"},
        "sparsegpt once": {"GRAM"},
        "sparsegpt + trim": {"GRAM", "INPUTS"},
    }


def test_which_recipes_change_the_kept_weights() -> None:
    retain = BarberOptions(retain_reconstruction=True)
    assert not Recipe().changes_weights
    assert Recipe(method="sparsegpt").changes_weights
    assert not Recipe(method="sparsegpt", barber=BarberOptions()).changes_weights
    assert Recipe(method="sparsegpt", barber=retain).changes_weights


REFUSED: list[tuple[dict[str, Any], bool, str]] = [
    ({"method": "wands"}, False, "--method 'wands' is none of wanda, magnitude, sparsegpt; did you mean 'wanda'"),
    ({"numerics": "exat"}, False, "--numerics 'exat' is none of exact, reference; did you mean 'exact'"),
    ({"rows": RowOptions()}, True, "--use-trim with an N:M pattern"),
    ({"variant": True}, True, "--use-variant with an N:M pattern"),
    ({"variant": True, "rows": RowOptions()}, False, "--use-variant with --use-trim"),
    ({"variant": True, "method": "magnitude"}, False, "--use-variant with --method magnitude"),
    ({"variant": True, "method": "sparsegpt"}, False, "--use-variant with --method sparsegpt"),
    ({"input_recalc": True}, False, "--input-recalc without --use-trim"),
    ({"propagate": False, "method": "sparsegpt"}, False, "--no-propagate with --method sparsegpt"),
    ({"propagate": False, "barber": BarberOptions()}, False, "--no-propagate with --prune-barber"),
    (
        {"propagate": False, "rows": RowOptions(), "input_recalc": True},
        False,
        "--no-propagate with --input-recalc",
    ),
    ({"update": UpdateOptions(mask_score="wanda")}, False, "--mask-score wanda with --method wanda"),
    ({"update": UpdateOptions(mask_update="block")}, False, "--mask-update block with --method wanda"),
    (
        {"method": "sparsegpt", "rows": RowOptions(), "update": UpdateOptions(mask_update="block")},
        False,
        "--use-trim with --mask-update block",
    ),
    ({"rows": RowOptions(iterations=0)}, False, "--iterations 0 must be at least 1"),
]


@pytest.mark.parametrize(("fields", "pattern", "message"), REFUSED)
def test_choices_that_do_not_go_together_are_named(fields: dict[str, Any], pattern: bool, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Recipe(**fields).check(pattern=pattern)


@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
def test_choices_that_do(fields: dict[str, Any]) -> None:
    Recipe(**fields).check()
    Recipe(**fields, barber=BarberOptions()).check()
    if "rows" in fields:
        Recipe(**fields, input_recalc=True).check()
    if fields.get("method") != "sparsegpt":
        Recipe(**fields, propagate=False).check()


def test_the_uniform_target() -> None:
    assert uniform_target(0.7, "unstructured") == Target(0.7)
    assert uniform_target(None, "2:4") == Target(0.5, (2, 4))
    assert uniform_target(0.5, "2:4") == Target(0.5, (2, 4))
    assert uniform_target(0.25, "3:4") == Target(0.25, (3, 4))
    for sparsity, kind, message in (
        (None, "unstructured", "no target was given"),
        (0.6, "2:4", "2 kept of 4 implies 0.5"),
        (1.0, "unstructured", r"--sparsity 1.0 is outside \[0, 1\)"),
        (-0.1, "unstructured", "outside"),
        (float("nan"), "unstructured", "outside"),
        (0.5, "2:5:7", "neither 'unstructured' nor N:M"),
        (0.5, "4:2", "neither 'unstructured' nor N:M"),
    ):
        with pytest.raises(OptionError, match=message):
            uniform_target(sparsity, kind)


def test_groups_that_do_not_fit_are_named() -> None:
    targets = {"a": Target(0.5, (2, 4)), "b": Target(0.5, (2, 4))}
    check_patterns(targets, {"a": (3, 8), "b": (3, 4)})
    with pytest.raises(OptionError, match="b has 6 inputs, which do not divide into groups of 4; leave it dense with"):
        check_patterns(targets, {"a": (3, 8), "b": (3, 6)})


def test_reference_numerics_are_foreseen() -> None:
    weight, stats = matrix(7, 13)
    for method in ("wanda", "magnitude"):
        recipe = Recipe(method=method, numerics="reference")
        for sparsity in (0.3, 0.55, 0.8):
            zeros = int((~recipe.choose(weight, stats, Target(sparsity)).keep).sum())
            assert abs(zeros - expected_zeros((7, 13), Target(sparsity), recipe)) <= 1
