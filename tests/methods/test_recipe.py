"""What is done with one matrix, and which choices go together."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimcli import BarberOptions, ObsOptions, Recipe, TrimOptions
from trimcli.errors import OptionError
from trimcli.methods.choice import Target
from trimcli.methods.layers.owl import OwlOptions
from trimcli.methods.masks import matrix_budget
from trimcli.methods.named import method, method_called, methods
from trimcli.methods.recipe import check_patterns, expected_zeros
from trimcli.methods.stats import SQNORM, GramOptions, LinearStats
from trimcli.methods.updates import obs_solver

THREE = TrimOptions(iterations=3)
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {},
    "obs": {"method": "obs"},
    "variant": {"rows": "variant"},
    "wanda + trim": {"rows": "trim"},
    "magnitude + trim": {"method": "magnitude", "rows": "trim", "options": (THREE,)},
    "obs + trim": {"method": "obs", "rows": "trim", "options": (THREE,)},
    "sparsegpt": {"method": "sparsegpt", "options": (ObsOptions(block_size=5),)},
    "sparsegpt by wanda": {"method": "sparsegpt", "options": (ObsOptions(block_size=5, mask_score="wanda"),)},
    "sparsegpt once": {"method": "sparsegpt", "options": (ObsOptions(mask_update="once"),)},
    "sparsegpt + trim": {"method": "sparsegpt", "rows": "trim", "options": (THREE,)},
    "sparsegpt without update": {"method": "sparsegpt", "update": "none"},
    "wanda + obs": {"update": "obs", "options": (ObsOptions(block_size=5),)},
    "variant + obs": {"rows": "variant", "update": "obs"},
    "magnitude + trim + obs": {"method": "magnitude", "rows": "trim", "update": "obs", "options": (THREE,)},
    "magnitude by row": {"method": "magnitude", "compare": "row"},
    "wanda by layer": {"compare": "layer"},
}
UPDATED = {
    "sparsegpt",
    "sparsegpt by wanda",
    "sparsegpt once",
    "sparsegpt + trim",
    "wanda + obs",
    "variant + obs",
    "magnitude + trim + obs",
}


def matrix(d_out: int, d_in: int, seed: int = 0) -> tuple[Tensor, LinearStats]:
    """A random weight [d_out, d_in] and its statistics over 6 samples of 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    x = torch.randn(6, 4, d_in, generator=generator)
    flat = x.reshape(-1, d_in)
    return weight, LinearStats(
        sqnorm=x.square().sum(dim=(0, 1)) / 6, inputs=x[:, -1].T.contiguous(), gram=2 / 6 * flat.T @ flat
    )


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
    assert (outcome.weight is not None) == (method in UPDATED) == recipe.changes_weights
    assert (outcome.rows is not None) == (recipe.rows == "trim")
    if outcome.weight is not None:
        assert not outcome.weight[~outcome.keep].any()
        assert bool(torch.isfinite(outcome.weight).all())


@pytest.mark.parametrize("method", [name for name, fields in METHODS.items() if "rows" not in fields])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (3, 8), (1, 2)])
def test_every_group_keeps_n_of_m(method: str, pattern: tuple[int, int]) -> None:
    fields = {**METHODS[method]}
    if "options" in fields:
        fields["options"] = (replace(fields["options"][0], block_size=128),)
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
    before = [tensor.clone() for tensor in (weight, stats.sqnorm, stats.inputs, stats.gram)]
    Recipe(**METHODS[method]).choose(weight, stats, Target(0.5))
    after = [weight, stats.sqnorm, stats.inputs, stats.gram]
    assert set(stats.tensors) == {"sqnorm", "inputs", "gram"}
    assert all(map(torch.equal, before, after))


def test_the_formulas() -> None:
    weight, stats = matrix(5, 8)
    wanda = weight.abs() * stats[SQNORM].sqrt()
    keep = Recipe().choose(weight, stats, Target(0.5)).keep
    for row in range(5):
        assert set(keep[row].nonzero().flatten().tolist()) == set(wanda[row].argsort()[4:].tolist())
    keep = Recipe(method="magnitude").choose(weight, stats, Target(0.5)).keep
    assert torch.equal(keep, weight.abs() >= weight.abs().flatten().sort().values[20])


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_which_weights_compete(method: str) -> None:
    weight, stats = matrix(6, 10)
    scores = weight.abs() * (stats.sqnorm.sqrt() if method == "wanda" else 1)
    by_row = Recipe(method=method, compare="row").choose(weight, stats, Target(0.4)).keep
    by_layer = Recipe(method=method, compare="layer").choose(weight, stats, Target(0.4)).keep
    assert torch.equal(by_row, scores > scores.sort(dim=1).values[:, 3:4])
    assert torch.equal(by_layer, scores > scores.flatten().sort().values[23])
    plain = Recipe(method=method).choose(weight, stats, Target(0.4)).keep
    assert torch.equal(plain, by_row if method == "wanda" else by_layer)


def test_half_precision_weights_are_scored_in_float32() -> None:
    weight, stats = matrix(5, 8)
    half = weight.half()
    assert torch.equal(
        Recipe().choose(half, stats, Target(0.5)).keep, Recipe().choose(half.float(), stats, Target(0.5)).keep
    )


def test_linears_that_share_a_gram_share_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats = matrix(5, 8)
    made: list[float] = []
    factorise = obs_solver.factorise

    def counted(gram: Tensor, damping: float) -> obs_solver.Factor:
        made.append(damping)
        return factorise(gram, damping)

    monkeypatch.setattr(obs_solver, "factorise", counted)
    recipe = Recipe(method="sparsegpt")
    first = recipe.choose(weight, stats, Target(0.5))
    second = recipe.choose(weight, stats, Target(0.5))
    assert made == [0.01]
    assert first.weight is not None
    assert second.weight is not None
    assert torch.equal(first.weight, second.weight)
    # The inputs collected anew leave the Gram, and so its factor, as it was.
    Recipe(method="obs", rows="trim").choose(weight, stats.with_(inputs=stats.inputs * 2), Target(0.5))
    assert made == [0.01]
    Recipe(method="sparsegpt", options=(ObsOptions(damping=0.5),)).choose(weight, stats, Target(0.5))
    assert made == [0.01, 0.5]


def test_the_score_takes_the_options_of_its_update() -> None:
    """The same damping and the same factor, whether the mask or the weights are asked for."""
    weight, stats = matrix(20, 30)
    options = (ObsOptions(damping=900.0, mask_update="once"),)
    mask = Recipe(method="obs", options=options).choose(weight, stats, Target(0.5)).keep
    weak = Recipe(method="obs").choose(weight, stats, Target(0.5)).keep
    whole = Recipe(method="sparsegpt", options=options).choose(weight, stats, Target(0.5)).keep
    assert torch.equal(mask, whole)
    assert not torch.equal(mask, weak)
    again = Recipe(method="sparsegpt", options=options, rows="trim")
    rows = again.choose(weight, stats, Target(0.5)).rows
    alone = Recipe(method="obs", options=options, rows="trim").choose(weight, stats, Target(0.5)).rows
    assert rows is not None
    assert alone is not None
    assert torch.equal(rows.keep, alone.keep)


def test_what_each_method_reads() -> None:
    needs = {name: set(Recipe(**fields).needs) for name, fields in METHODS.items()}
    assert needs == {
        "magnitude": set(),
        "wanda": {"sqnorm"},
        "obs": {"gram"},
        "variant": {"sqnorm"},
        "wanda + trim": {"sqnorm", "inputs"},
        "magnitude + trim": {"inputs"},
        "obs + trim": {"gram", "inputs"},
        "sparsegpt": {"gram"},
        "sparsegpt by wanda": {"gram", "sqnorm"},
        "sparsegpt once": {"gram"},
        "sparsegpt + trim": {"gram", "inputs"},
        "sparsegpt without update": {"gram"},
        "wanda + obs": {"gram", "sqnorm"},
        "variant + obs": {"gram", "sqnorm"},
        "magnitude + trim + obs": {"gram", "inputs"},
        "magnitude by row": set(),
        "wanda by layer": {"sqnorm"},
    }


def test_what_is_chosen_and_with_which_options() -> None:
    own = ObsOptions(block_size=5, mask_score="wanda")
    recipe = Recipe(method="sparsegpt", rows="trim", options=(own, GramOptions("float64")))
    names = (recipe.named.title, recipe.scoring.name, recipe.allocating.name, recipe.updating.name)
    assert names == ("SparseGPT", "wanda", "trim", "obs")
    assert [entry.name for entry in recipe.entries] == ["wanda", "trim", "obs", "gram", "inputs", "sqnorm"]
    assert recipe.options_of(recipe.updating) is own
    assert recipe.options_of(recipe.scoring) is None
    assert recipe.options_of(recipe.allocating) == TrimOptions()
    document = recipe.document()
    assert {name: document[name] for name in ("method", "score", "rows", "update", "numerics")} == {
        "method": "sparsegpt",
        "score": "wanda",
        "rows": "trim",
        "update": "obs",
        "numerics": "exact",
    }
    assert document["options"] == {
        "trim": {"qmetric": "cosim_flat", "qmetric_dimwise": "cosim", "iterations": 10, "forbid_negative": False},
        "obs": {**asdict(ObsOptions()), "mask_score": "wanda", "block_size": 5},
        "gram": {"gram_dtype": "float64"},
    }
    assert Recipe().document()["options"] == {}
    # Options of an entry that was not chosen, as one command line for several methods has them, shape nothing.
    assert Recipe(options=(THREE, GramOptions("float64"))).document() == Recipe().document()


def test_what_a_method_is_called() -> None:
    named = {name: (one.score, one.update) for name, one in methods().items()}
    assert list(named)[:5] == ["wanda", "magnitude", "obs", "sparsegpt", "admm"]
    assert (named.pop("sparsegpt"), named.pop("admm")) == (("obs", "obs"), ("wanda", "admm"))
    assert all(made == (name, "none") for name, made in named.items())
    assert method_called("wanda").title == "Wanda"
    with pytest.raises(OptionError, match=r"--method 'sparsgpt' is none of .*; did you mean 'sparsegpt'"):
        method_called("sparsgpt")
    with pytest.raises(ValueError, match="a method named 'sparsegpt' is registered already"):
        method("sparsegpt", score="obs", update="obs", title="", help="", source="")


def test_which_recipes_change_the_kept_weights() -> None:
    retain = BarberOptions(retain_reconstruction=True)
    assert not Recipe().changes_weights
    assert Recipe(method="sparsegpt").changes_weights
    assert not Recipe(method="sparsegpt", barber=BarberOptions()).changes_weights
    assert Recipe(method="sparsegpt", barber=retain).changes_weights
    assert not Recipe(barber=retain).changes_weights
    assert not Recipe(method="sparsegpt", update="none").changes_weights


REFUSED: list[tuple[dict[str, Any], bool, str]] = [
    (
        {"method": "wands"},
        False,
        "--method 'wands' is none of wanda, magnitude, obs, sparsegpt, admm; did you mean 'wanda'",
    ),
    ({"numerics": "exat"}, False, "--numerics 'exat' is none of exact, reference; did you mean 'exact'"),
    ({"rows": "trm"}, False, "--rows 'trm' is none of even, free, trim, variant; did you mean 'trim'"),
    ({"update": "osb"}, False, "--update 'osb' is none of none, obs, cg, admm; did you mean 'obs'"),
    ({"rows": "trim"}, True, "--use-trim with an N:M pattern"),
    ({"rows": "variant"}, True, "--use-variant with an N:M pattern"),
    ({"rows": "variant", "method": "magnitude"}, False, "--use-variant with --method magnitude: it is made for wanda"),
    ({"rows": "variant", "method": "sparsegpt"}, False, "--use-variant with --method sparsegpt: it is made for wanda"),
    ({"compare": "layer", "rows": "trim"}, False, "--compare layer with --use-trim: it says how rows share, too"),
    ({"compare": "row"}, True, "--compare row with an N:M pattern"),
    ({"compare": "row", "method": "admm"}, False, "--compare row with --update admm"),
    ({"input_recalc": True}, False, "--input-recalc without --use-trim"),
    ({"input_recalc": True, "rows": "variant"}, False, "--input-recalc without --use-trim"),
    ({"propagate": False, "method": "sparsegpt"}, False, "--no-propagate with --method sparsegpt: its gram comes from"),
    ({"propagate": False, "method": "obs"}, False, "--no-propagate with --method obs: its gram comes from"),
    ({"propagate": False, "update": "obs"}, False, "--no-propagate with --method wanda: its gram comes from"),
    ({"propagate": False, "barber": BarberOptions()}, False, "--no-propagate with --prune-barber"),
    ({"propagate": False, "rows": "trim", "input_recalc": True}, False, "--no-propagate with --input-recalc"),
    (
        {"options": (ObsOptions(mask_score="wanda"),)},
        False,
        "--mask-score wanda with --method wanda: it belongs to obs, as in sparsegpt",
    ),
    (
        {"options": (ObsOptions(mask_update="block"),)},
        False,
        "--mask-update block with --method wanda: it belongs to obs, as in sparsegpt",
    ),
    (
        {"method": "sparsegpt", "update": "cg", "options": (ObsOptions(mask_score="wanda"),)},
        False,
        "--mask-score wanda with --update cg: only the update obs reads it",
    ),
    (
        {"method": "sparsegpt", "update": "none", "options": (ObsOptions(mask_update="once"),)},
        False,
        "--mask-update once with --update none: only the update obs reads it",
    ),
    (
        {"method": "sparsegpt", "rows": "trim", "options": (ObsOptions(mask_update="block"),)},
        False,
        "--use-trim with --mask-update block",
    ),
    (
        {"update": "obs", "rows": "variant", "options": (ObsOptions(mask_update="block"),)},
        False,
        "--use-variant with --mask-update block",
    ),
    ({"options": (OwlOptions(group=8),)}, False, "--group 8 with --method wanda: it belongs to owl"),
]


@pytest.mark.parametrize(("fields", "pattern", "message"), REFUSED)
def test_choices_that_do_not_go_together_are_named(fields: dict[str, Any], pattern: bool, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Recipe(**fields).check(pattern=pattern)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": 0}, "--iterations 0 must be at least 1"),
        ({"iterations": -1}, "--iterations -1 must be at least 1"),
    ],
)
def test_options_of_a_choice_are_refused_where_they_are_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Recipe(rows="trim", options=(TrimOptions(**fields),))


@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
def test_choices_that_do(fields: dict[str, Any]) -> None:
    Recipe(**fields).check()
    Recipe(**fields, barber=BarberOptions()).check()
    if fields.get("rows") == "trim":
        Recipe(**fields, input_recalc=True).check()
    if "gram" not in Recipe(**fields).needs:
        Recipe(**fields, propagate=False).check()


def test_groups_that_do_not_fit_are_named() -> None:
    targets = {"a": Target(0.5, (2, 4)), "b": Target(0.5, (2, 4))}
    check_patterns(targets, {"a": (3, 8), "b": (3, 4)})
    with pytest.raises(OptionError, match="b has 6 inputs, which do not divide into groups of 4; leave it dense with"):
        check_patterns(targets, {"a": (3, 8), "b": (3, 6)})


def test_reference_numerics_are_foreseen() -> None:
    weight, stats = matrix(7, 13)
    names = ("wanda", "magnitude", "obs", "sparsegpt")
    ways: list[dict[str, Any]] = [{"method": name} for name in names]
    ways += [{"method": name, "compare": group} for name in names[:2] for group in ("row", "layer")]
    for way in ways:
        recipe = Recipe(**way, numerics="reference")
        for sparsity in (0.3, 0.55, 0.8):
            zeros = int((~recipe.choose(weight, stats, Target(sparsity)).keep).sum())
            assert abs(zeros - expected_zeros((7, 13), Target(sparsity), recipe)) <= 1
