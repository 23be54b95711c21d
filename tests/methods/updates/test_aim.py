"""The dense target: least squares, how far towards it, and held-out samples that speak against it."""

import pytest
import torch
from torch import Tensor

from tests.methods.updates.test_fit import problem
from trimcli.errors import OptionError
from trimcli.methods.choice import Target
from trimcli.methods.heldout import error
from trimcli.methods.recipe import Recipe
from trimcli.methods.stats import FITTING, LinearStats
from trimcli.methods.updates.aim import SHARES, aimed, dense_target
from trimcli.methods.updates.cg_solver import fitted


def paired(apart: float = 0.5, heldout: float | None = None, seed: int = 0) -> tuple[Tensor, LinearStats, list[Tensor]]:
    """A weight, statistics of 200 and 40 tokens, and these: pruned and dense inputs, fitted and held out.

    apart: how much of the dense inputs the pruned ones have lost, the same way in both halves unless `heldout` says.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=generator) / 24**0.5 + torch.eye(24)
    change = torch.randn(24, 24, generator=generator) / 24**0.5
    dense = torch.randn(240, 24, generator=generator) @ mixing
    lost = [apart] * 200 + [apart if heldout is None else heldout] * 40
    pruned = dense + torch.tensor(lost).unsqueeze(1) * (dense @ change)
    x, z, held_x, held_z = pruned[:200], dense[:200], pruned[200:], dense[200:]
    stats = LinearStats(
        sqnorm=x.square().sum(dim=0), fitting=x.T @ x, cross=z.T @ x,
        heldout=held_x.T @ held_x, heldout_cross=held_z.T @ held_x, heldout_dense=held_z.T @ held_z,
    )  # fmt: skip
    return torch.randn(12, 24, generator=generator), stats, [x, z, held_x, held_z]


@pytest.mark.parametrize("ridge", [1e-4, 0.01, 1.0])
def test_the_target_is_that_of_least_squares(ridge: float) -> None:
    weight, stats, (x, z, _, _) = paired()
    held = (ridge * x.double().square().sum(dim=0).mean()).sqrt() * torch.eye(24, dtype=torch.float64)
    inputs, outputs = torch.cat([x.double(), held]), torch.cat([z.double(), held]) @ weight.double().T
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    torch.testing.assert_close(dense_target(weight, stats, ridge).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_error_is_that_of_held_out_outputs() -> None:
    weight, stats, (_, _, x, z) = paired()
    found = weight * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) > 0.5)
    outputs = z @ weight.T
    expected = (x @ found.T - outputs).square().sum() / outputs.square().sum()
    assert error(weight, found, stats) == pytest.approx(float(expected), rel=1e-4)
    plain = stats.with_(heldout_cross=None)
    expected = (x @ (found - weight).T).square().sum() / (x @ weight.T).square().sum()
    assert error(weight, found, plain) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("heldout", "share"), [(None, 1.0), (0.0, 0.0), (-0.5, 0.0), (0.15, 0.25)])
def test_held_out_samples_say_how_far(heldout: float | None, share: float) -> None:
    """Where these lose what the others lose, all the way; where they lose nothing or the contrary, not at all."""
    weight, stats, (_, _, x, z) = paired(heldout=heldout)
    keep = weight.abs() > 0.1

    def fit(target: Tensor) -> Tensor:
        return fitted(target, keep, stats[FITTING], ridge=0.01, steps=200)

    found, judged = aimed(weight, fit(weight), stats, 0.01, fit)
    target = dense_target(weight, stats, 0.01)
    errors = {}
    for one in (0.0, *SHARES):
        values = fit(torch.lerp(weight, target, one))
        errors[one] = float((x @ values.T - z @ weight.T).square().sum() / (z @ weight.T).square().sum())
    assert min(errors, key=errors.__getitem__) == share
    assert (judged.step, judged.better) == ("dense target", share > 0)
    nearest = min(errors[one] for one in SHARES)
    assert (judged.before, judged.after) == pytest.approx((errors[0.0], nearest), rel=1e-3)
    torch.testing.assert_close(found, fit(torch.lerp(weight, target, share)), rtol=1e-3, atol=1e-3)
    assert not found[~keep].any()


@pytest.mark.parametrize("fields", [{"update": "cg"}, {"method": "admm"}])
def test_a_recipe_aims_where_statistics_tell_of_dense_inputs(fields: dict[str, str]) -> None:
    weight, stats, _ = paired()
    recipe = Recipe(**fields, target="dense")  # type: ignore[arg-type]
    assert recipe.needs >= {"fitting", "heldout", "cross", "heldout_cross", "heldout_dense"}
    assert recipe.needs_dense_walk
    plain = stats.with_(cross=None, heldout_cross=None, heldout_dense=None)
    before, after = (recipe.choose(weight, one, Target(0.5)) for one in (plain, stats))
    assert torch.equal(before.keep, after.keep)
    assert before.weight is not None
    assert after.weight is not None
    assert error(weight, after.weight, stats) < 0.9 * error(weight, before.weight, stats)
    assert [one.step for one in after.judged] == ["dense target", next(iter(fields.values()))]


def test_a_gram_that_cannot_be_factorised_is_damped_more() -> None:
    weight, stats, _ = paired()
    gram = stats[FITTING].clone()
    gram[:, 3] = gram[:, 2]
    gram[3] = gram[2]
    gram[2, 2] = gram[3, 3] = gram[2, 3] * 0.9999
    assert torch.linalg.eigvalsh(gram.double()).min() < 0
    assert torch.isfinite(dense_target(weight, stats.with_(fitting=gram), 1e-7)).all()


def test_equal_inputs_leave_everything_as_it_is() -> None:
    """As in the first layer."""
    weight, stats, _ = paired(apart=0.0)
    torch.testing.assert_close(dense_target(weight, stats, 0.01), weight)
    assert problem()[1].tensors.keys().isdisjoint({"cross"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "--target dense with --update none"),
        ({"method": "sparsegpt"}, "--target dense with --update obs"),
        ({"update": "cg", "propagate": False}, "--no-propagate with --target dense"),
        ({"update": "cg", "target": "sparse"}, "--target 'sparse' is none of pruned, dense"),
    ],
)
def test_what_does_not_go_with_it_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Recipe(**{"target": "dense", **fields}).check()  # type: ignore[arg-type]
    Recipe(update="cg", target="dense").check()
