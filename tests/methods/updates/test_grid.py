"""Pruning and rounding together against the recursion one weight at a time."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.methods.updates.test_obs import (
    Array,
    KeepRule,
    damped,
    problem,
    remaining_inverse,
    sparsegpt,
    without_lowest,
)
from trimcli.errors import OptionError
from trimcli.methods.choice import Choice, Target
from trimcli.methods.recipe import Recipe
from trimcli.methods.scores import SCORES
from trimcli.methods.stats import LinearStats
from trimcli.methods.updates.grid import Grid
from trimcli.methods.updates.obs import ObsOptions, obs


def test_a_grid_by_hand() -> None:
    grid = Grid.empty(4, 4, (3, 8), torch.device("cpu"))
    grid.fit(1, torch.tensor([[-1.0, 0.0, 2.0, 6.5], [1.0, 2.0, 3.0, 7.5], [0.0, 0.0, 0.0, 0.0]]))
    assert grid.scales[:, 1].tolist() == [0.5, 0.5, torch.tensor(2 / 15).bfloat16().item()]
    assert grid.zeros[:, 1].tolist() == [2, 0, 7]
    assert grid.scales[:, 0].tolist() == [0, 0, 0]
    integers = grid.nearest(torch.tensor([2.2, -3.0, 0.0]), 5)
    assert integers.tolist() == [6, 0, 7]
    assert grid.values(integers, 5).tolist() == [2.0, 0.0, 0.0]
    rows, columns = torch.tensor([0, 0, 1]), torch.tensor([4, 7, 6])
    assert grid.nearest(torch.tensor([-9.0, 9.0, 9.0]), columns, rows).tolist() == [0, 15, 15]


def exact_rounded(
    weight: torch.Tensor, hessian: Array, rule: KeepRule, stride: int, wbits: int, group_size: int
) -> tuple[Array, NDArray[np.bool_]]:
    """The recursion of the paper's appendix in float64: a column's weights go or are rounded, the rest makes up."""
    updated = weight.double().numpy().copy()
    keep = np.ones(updated.shape, dtype=bool)
    corners = np.array([remaining_inverse(hessian, c)[0, 0] for c in range(len(hessian))])
    most = 2**wbits - 1
    scale, zero = np.ones(len(updated)), np.zeros(len(updated))
    for column in range(len(hessian)):
        if column % stride == 0:
            reached = slice(column, column + stride)
            keep[:, reached] = rule(updated[:, reached], corners[reached], column)
        if column % group_size == 0:
            for row, group in enumerate(updated[:, column : column + group_size]):
                least, greatest = min(group.min(), 0.0), max(group.max(), 0.0)
                scale[row] = torch.tensor((greatest - least) / most, dtype=torch.float32).bfloat16().item()
                zero[row] = min(max(round(-least / scale[row]), 0), most)
        inverse = remaining_inverse(hessian, column)
        for row in range(len(updated)):
            value = updated[row, column]
            integer = min(max(round(value / scale[row]) + zero[row], 0), most)
            rounded = (integer - zero[row]) * scale[row] if keep[row, column] else 0.0
            updated[row, column:] -= (value - rounded) / inverse[0, 0] * inverse[0]
            updated[row, column] = rounded
    return updated, keep


@pytest.mark.parametrize("wbits", [8, 4])
@pytest.mark.parametrize(("block_size", "group_size"), [(8, 8), (8, 4), (8, 16), (8, 128), (24, 6), (128, 128)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75])
def test_it_is_the_exact_recursion(sparsity: float, block_size: int, group_size: int, wbits: int) -> None:
    weight, _, gram = problem(31)

    def rule(columns: Array, corners: Array, start: int) -> NDArray[np.bool_]:
        end = start + columns.shape[1]
        return without_lowest(columns**2 / corners, round(sparsity * 6 * end) - round(sparsity * 6 * start))

    options = ObsOptions(block_size=block_size, wbits=wbits, group_size=group_size)
    found = sparsegpt(weight, gram, sparsity=sparsity, options=options)
    expected, keep = exact_rounded(weight, damped(gram), rule, block_size, wbits, group_size)
    np.testing.assert_array_equal(found.keep.numpy(), keep)
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=2e-4, atol=2e-5)


def test_two_of_four_is_the_exact_recursion() -> None:
    weight, _, gram = problem(32)

    def rule(columns: Array, corners: Array, _start: int) -> NDArray[np.bool_]:
        return np.stack([without_lowest(row, 2) for row in columns**2 / corners])

    found = sparsegpt(weight, gram, pattern=(2, 4), options=ObsOptions(block_size=8, wbits=4, group_size=8))
    expected, keep = exact_rounded(weight, damped(gram), rule, 4, 4, 8)
    np.testing.assert_array_equal(found.keep.numpy(), keep)
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("wbits", [8, 4])
def test_every_kept_weight_is_a_value_of_the_grid(wbits: int) -> None:
    weight, _, gram = problem(33, d_in=40)
    options = ObsOptions(block_size=16, wbits=wbits, group_size=16)
    made = obs(weight, Choice(SCORES["obs"], LinearStats(gram=gram), Target(0.5)), options)
    assert made.grid is not None
    assert made.weight is not None
    assert made.grid.scales.shape == made.grid.zeros.shape == (6, 3)
    for column in range(40):
        there = made.weight[:, column]
        assert torch.equal(made.grid.values(made.grid.nearest(there, column), column), there)
    assert (made.weight[~made.keep] == 0).all()


def test_compensating_beats_rounding_afterwards() -> None:
    weight, inputs, gram = problem(34, d_out=16, d_in=64, samples=400)
    options = ObsOptions(wbits=4, group_size=64, block_size=64)
    together = sparsegpt(weight, gram, options=options).weight
    pruned = sparsegpt(weight, gram, options=ObsOptions(block_size=64))
    grid = Grid.empty(4, 64, (16, 64), weight.device)
    grid.fit(0, pruned.weight)
    columns = [grid.values(grid.nearest(pruned.weight[:, column], column), column) for column in range(64)]
    afterwards = torch.stack(columns, dim=1) * pruned.keep

    def error(made: torch.Tensor) -> float:
        return float((inputs @ (made - weight).T).square().sum())

    assert error(together) < 0.8 * error(afterwards)


def test_without_bits_there_is_no_grid() -> None:
    weight, _, gram = problem(35)
    choice = Choice(SCORES["obs"], LinearStats(gram=gram), Target(0.5))
    assert obs(weight, choice, ObsOptions()).grid is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wbits": 3}, "--wbits 3 is not usable; give 8 or 4"),
        ({"group_size": 0}, "--group-size 0"),
        ({"wbits": 4, "group_size": 96}, "--group-size 96 and --block-size 128 cut through each other"),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ObsOptions(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "wanda"}, "--wbits 4 with --method wanda: it belongs to obs"),
        ({"method": "sparsegpt", "update": "none"}, "--wbits 4 with --update none: only the update obs rounds"),
        ({"method": "sparsegpt", "reconstruct": "layer"}, "--wbits 4 with --reconstruct: it gives what was rounded"),
    ],
)
def test_what_does_not_go_with_it(fields: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Recipe(**fields, options=(ObsOptions(wbits=4),)).check()  # type: ignore[arg-type]
    Recipe(method="wanda", update="obs", options=(ObsOptions(wbits=4),)).check()
