"""Swaps: the change they promise, brute force over all pairs, counts that hold, and no step for the worse."""

from itertools import product

import pytest
import torch
from torch import Tensor

from tests.methods.updates.test_fit import error, problem
from trimcli.errors import OptionError
from trimcli.methods import masks
from trimcli.methods.choice import Target
from trimcli.methods.recipe import Recipe
from trimcli.methods.refine.swap_search import search
from trimcli.methods.stats import FITTING, LinearStats


def row_error(row: Tensor, keep: Tensor, gram: Tensor) -> float:
    gone = (row * ~keep).double()
    return float(gone @ gram.double() @ gone)


def by_hand(row: Tensor, keep: Tensor, gram: Tensor, swaps: int, group: int | None = None) -> Tensor:
    """The best of all swaps, again and again, each tried out whole."""
    keep = keep.clone()
    for _ in range(swaps):
        found = []
        for out, back in product(range(len(row)), repeat=2):
            if keep[out] and not keep[back] and (group is None or out // group == back // group):
                other = keep.clone()
                other[out], other[back] = False, True
                found.append((row_error(row, other, gram), other))
        if not found:
            break
        least, other = min(found, key=lambda one: one[0])
        if least >= row_error(row, keep, gram) * (1 - 1e-6):
            break
        keep = other
    return keep


def start(weight: Tensor, sparsity: float = 0.6, seed: int = 1) -> Tensor:
    """A mask that leaves much to better."""
    scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
    return masks.lowest_overall(scores, sparsity, "exact")


@pytest.mark.parametrize("group", [None, 4, 8])
@pytest.mark.parametrize("seed", range(6))
def test_every_swap_is_the_best_of_all(seed: int, group: int | None) -> None:
    weight, stats = problem(seed, d_out=20, d_in=8)
    gram, keep = stats[FITTING], start(weight, seed=seed)
    for share, swaps in ((1 / 8, 1), (2 / 8, 2), (1.0, 8)):
        found = search(weight, keep, gram, group=group, candidates=8, share=share)
        expected = torch.stack([by_hand(weight[row], keep[row], gram, swaps, group) for row in range(20)])
        assert torch.equal(found, expected)
    assert not torch.equal(found, keep)


def test_the_change_is_that_of_the_error() -> None:
    """The formula that the search rests on, from the losses themselves."""
    weight, stats = problem(d_out=1, d_in=8)
    row, gram, keep = weight[0].double(), stats[FITTING].double(), start(weight)[0]
    pull = gram @ (row * ~keep)
    for out, back in product(keep.nonzero().flatten().tolist(), (~keep).nonzero().flatten().tolist()):
        other = keep.clone()
        other[out], other[back] = False, True
        alone = [row[at] ** 2 * gram[at, at] for at in (out, back)]
        change = 2 * row[out] * pull[out] + alone[0] - 2 * row[back] * pull[back] + alone[1]
        change -= 2 * row[out] * row[back] * gram[out, back]
        assert float(change) == pytest.approx(row_error(row, other, gram) - row_error(row, keep, gram), rel=1e-9)


@pytest.mark.parametrize("candidates", [1, 4, 16, 99])
@pytest.mark.parametrize("group", [None, 4])
def test_counts_hold_and_no_row_is_worse(candidates: int, group: int | None) -> None:
    weight, stats = problem(d_out=32, d_in=64)
    gram, keep = stats[FITTING], start(weight)
    before = torch.tensor([row_error(weight[row], keep[row], gram) for row in range(32)])
    for share in (0.05, 0.25, 1.0):
        found = search(weight, keep, gram, candidates=candidates, share=share, group=group)
        width = group or 64
        assert torch.equal(found.unflatten(1, (-1, width)).sum(dim=2), keep.unflatten(1, (-1, width)).sum(dim=2))
        assert bool(((found & ~keep).sum(dim=1) <= round(share * 64)).all())
        after = torch.tensor([row_error(weight[row], found[row], gram) for row in range(32)])
        assert bool((after <= before * (1 + 1e-6)).all())
        assert after.sum() < 0.95 * before.sum()


def test_rows_are_worked_on_alike_alone_and_together() -> None:
    weight, stats = problem(d_out=12, d_in=24)
    keep = start(weight)
    whole = search(weight, keep, stats[FITTING])
    alone = [search(weight[row : row + 1], keep[row : row + 1], stats[FITTING]) for row in range(12)]
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize("kept", [0, 24])
def test_where_there_is_nothing_to_swap_all_stays(kept: int) -> None:
    weight, stats = problem()
    keep = torch.full_like(weight, bool(kept), dtype=torch.bool)
    for group in (None, 4):
        assert torch.equal(search(weight, keep, stats[FITTING], group=group), keep)
        half = start(weight)
        assert torch.equal(search(weight, half, torch.zeros(24, 24), group=group), half)


def test_what_may_not_return_does_not() -> None:
    weight, stats = problem(d_out=32, d_in=64)
    free = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) > 0.3
    keep = start(weight) & free
    for group in (None, 8):
        found = search(weight, keep, stats[FITTING], free=free, group=group)
        assert not found[~free].any()
        assert not torch.equal(found, keep)
        assert torch.equal(found.sum(dim=1), keep.sum(dim=1))


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight, stats = problem()
    with pytest.raises(ValueError, match="do not fit"):
        search(weight, torch.ones(3, 3, dtype=torch.bool), stats[FITTING])


# --- in a recipe -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [None, "cg"])
@pytest.mark.parametrize(
    ("fields", "target"),
    [
        ({}, Target(0.6)),
        ({"rows": "trim"}, Target(0.6)),
        ({"rows": "free"}, Target(0.6)),
        ({"method": "magnitude"}, Target(0.6)),
        ({}, Target(0.5, (2, 4))),
    ],
)
def test_a_recipe_keeps_its_counts_and_comes_nearer(fields: dict[str, str], target: Target, update: str | None) -> None:
    weight, stats = problem(d_out=32, d_in=64)
    plain = Recipe(**fields, update=update).choose(weight, stats, target)  # type: ignore[arg-type]
    found = Recipe(**fields, update=update, refine="swaps").choose(weight, stats, target)  # type: ignore[arg-type]
    groups = target.pattern[1] if target.pattern else 64
    assert torch.equal(
        found.keep.unflatten(1, (-1, groups)).sum(dim=2), plain.keep.unflatten(1, (-1, groups)).sum(dim=2)
    )
    values = [weight * one.keep if one.weight is None else one.weight for one in (plain, found)]
    before, after = (error(weight, one, stats[FITTING]) for one in values)
    assert after < before
    assert (found.weight is None) == (update is None)
    assert [one.step for one in found.judged] == ["swaps", *([update] if update else [])]
    assert all(one.better for one in found.judged)


@pytest.mark.parametrize("update", [None, "cg"])
def test_swaps_that_held_out_samples_speak_against_are_undone(update: str | None) -> None:
    """What pays on the fitted samples costs on these: of two channels that cancel each other there, one goes."""
    weight, fitting = torch.ones(4, 4), torch.eye(4)
    fitting[0, 1] = fitting[1, 0] = -0.99
    sqnorm = torch.tensor([1.0, 0.5, 0.6, 1.0])
    heldout = torch.diag(sqnorm)
    stats = LinearStats(fitting=fitting, heldout=heldout, sqnorm=sqnorm)
    plain, target = Recipe().choose(weight, stats, Target(0.5)), Target(0.5)
    assert plain.keep.tolist() == [[True, False, False, True]] * 4
    swapped = search(weight, plain.keep, fitting)
    assert swapped.tolist() == [[False, False, True, True]] * 4
    found = Recipe(refine="swaps", update=update).choose(weight, stats, target)
    assert torch.equal(found.keep, plain.keep)
    judged = found.judged[0]
    assert (judged.step, judged.better) == ("swaps", False)
    assert (judged.before, judged.after) == pytest.approx((1.1 / 3.1, 1.5 / 3.1))
    said = "swaps would have raised the error (0.4839 on held-out samples, 0.3548 before), so what was before it stays"
    assert judged.remark == said
    agreeing = Recipe(refine="swaps").choose(weight, stats.with_(heldout=fitting), target)
    assert torch.equal(agreeing.keep, swapped)
    assert agreeing.judged[0].better
    single = Recipe(refine="swaps").choose(weight, stats.with_(heldout=torch.zeros(4, 4)), target)
    assert torch.equal(single.keep, swapped), "of one sample nothing is held out"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"propagate": False}, "--no-propagate with --refine swaps"),
        ({"method": "admm"}, "--refine swaps with --update admm"),
        ({"method": "sparsegpt"}, "--refine swaps with --update obs"),
        ({"refine": "swap"}, "--refine 'swap' is none of none, swaps"),
    ],
)
def test_what_does_not_go_with_swaps_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Recipe(**{"refine": "swaps", **fields}).check()  # type: ignore[arg-type]
    Recipe(refine="swaps", update="cg").check()
