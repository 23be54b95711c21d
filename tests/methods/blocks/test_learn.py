"""Learned masks: the best of all masks on a tiny layer, exact counts each way, never worse than the start."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimcli.methods.blocks.learn import Counts, Learnable, learn_masks
from trimcli.methods.blocks.reconstruct import Batch
from trimcli.methods.masks import lowest_per_row, n_of_m

Layer = Callable[[Tensor], Any]


def batches(dense: Layer, inputs: list[Tensor]) -> list[Batch]:
    with torch.no_grad():
        pairs = [(one, dense(one)) for one in inputs]
    return [Batch(lambda one=one: ((one,), {}), lambda target=target: target) for one, target in pairs]  # type: ignore[misc]


def alike(count: int, width: int, seed: int) -> list[Tensor]:
    """Inputs of few kinds: what one weight loses, others can make up for."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(3, width, generator=generator)
    return [torch.randn(2, 16, 3, generator=generator) @ mixing for _ in range(count)]


def wanda(weight: Tensor, inputs: list[Tensor]) -> Tensor:
    return weight.abs() * torch.cat(inputs).square().sum(dim=(0, 1)).sqrt()


class Row(nn.Module):
    """One row of six weights, beside its inputs: no token's target is near zero."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(6, 1, bias=False).requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([hidden, self.linear(hidden)], dim=-1)


@pytest.mark.parametrize(("seed", "found"), [(0, True), (4, True), (5, False), (6, False), (7, False)])
def test_the_best_mask_of_all_is_reached(seed: int, found: bool) -> None:
    """Three of six weights are to go: twenty masks, each tried. It is no search: these draws have no trap on the way.

    found: whether Wanda has found it already.
    """
    layer, inputs = Row(seed), alike(4, 6, seed)
    weight = layer.linear.weight.clone()

    def error(keep: Tensor) -> float:
        x = torch.cat(inputs).flatten(0, 1).double()
        gap, target = x @ (weight * ~keep).double().mT, x @ weight.double().mT
        return float((gap.square() / (target.square() + x.square().sum(dim=1, keepdim=True))).mean())

    every = [torch.zeros(1, 6).index_fill(1, torch.tensor(one), 1.0).bool() for one in combinations(range(6), 3)]
    keep = lowest_per_row(wanda(weight, inputs), torch.tensor([3]))
    what = Learnable("linear.weight", lambda one: one, weight, keep, wanda(weight, inputs))
    made = learn_masks(layer, [what], batches(layer, inputs), batches(layer, inputs), steps=200, lr=0.1)
    assert (error(keep) == min(map(error, every))) == found
    assert made.before == pytest.approx(error(keep), rel=1e-4)
    assert made.after == pytest.approx(error(made.keep[0]), rel=1e-4)
    assert made.after == pytest.approx(min(map(error, every)), rel=1e-4)


class Toy(nn.Module):
    """Two linears, one of them stored as [D_in, D_out], with a nonlinearity between them; gives back a tuple."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 16).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(16, 8) / 4, requires_grad=False)
        self.idle = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return hidden + torch.tanh(self.up(hidden)) @ self.down, None


def toy(counts: Counts, **more: Any) -> tuple[Any, list[Learnable], Toy]:
    layer, inputs = Toy(), alike(12, 8, 1)
    made = []
    for name, view in (("up.weight", _same), ("down", _turned), ("idle.weight", _same)):
        weight = view(layer.get_parameter(name)).clone()
        if isinstance(counts, int):
            keep = n_of_m(weight.abs(), 2, counts)
        else:
            keep = lowest_per_row(weight.abs(), torch.arange(len(weight)) % weight.shape[1])
        made.append(Learnable(name, view, weight, keep, weight.abs(), counts))
    dense = batches(lambda one: Toy()(one)[0], inputs)
    return learn_masks(layer, made, dense[:-2], dense[-2:], **{"steps": 40, "lr": 0.1, **more}), made, layer


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _turned(tensor: Tensor) -> Tensor:
    return tensor.mT


@pytest.mark.parametrize("counts", ["row", "matrix", 4])
def test_counts_are_held_where_they_are_asked_for(counts: Counts) -> None:
    made, matrices, layer = toy(counts)
    assert made.after < made.before
    for learned, start in zip(made.keep, matrices, strict=True):
        width = counts if isinstance(counts, int) else start.keep.shape[1]
        old, new = ((~mask).reshape(-1, width).sum(dim=1) for mask in (start.keep, learned))
        assert torch.equal(old.sum(), new.sum())
        if counts != "matrix":
            assert torch.equal(old, new)
        assert torch.equal(learned, start.keep) == (start.parameter == "idle.weight"), "what nobody calls stays"
    assert all(torch.equal(one, Toy().get_parameter(name)) for name, one in layer.named_parameters())


@pytest.mark.parametrize("counts", ["row", "matrix", 4])
def test_it_is_never_worse_than_its_start(counts: Counts) -> None:
    made, matrices, _ = toy(counts, steps=3, lr=0.99)
    assert made.after <= made.before
    if made.after == made.before:
        assert all(map(torch.equal, made.keep, (one.keep for one in matrices)))


def test_a_rate_of_almost_nothing_changes_nothing() -> None:
    made, matrices, _ = toy("matrix", lr=1e-9)
    assert all(map(torch.equal, made.keep, (one.keep for one in matrices)))
    assert made.after == made.before
