"""Outputs of pruned matrices, multiplied anew and updated, against a plain masked product."""

import pytest
import torch
from torch import Tensor

from trimcli.methods import ranking
from trimcli.methods.rows import product as outputs
from trimcli.methods.rows.product import Product

D_OUT, D_IN, SAMPLES = 11, 40, 7


@pytest.fixture(params=[0, 64, 1 << 18], ids=["rows", "blocks", "whole"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_SMALLEST_BLOCK", request.param)


def matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers, so that every sum is exact, and scores with ties."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-6, 7, (D_OUT, D_IN), generator=generator).float()
    return weight, weight.abs(), torch.randint(-6, 7, (D_IN, SAMPLES), generator=generator).float()


def masked_product(weight: Tensor, scores: Tensor, inputs: Tensor, counts: list[int]) -> Tensor:
    pruned = weight.clone()
    for row, count in enumerate(counts):
        pruned[row, scores[row].argsort(stable=True)[:count]] = 0
    return pruned @ inputs


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_outputs_at_any_counts(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_UPDATE_SHARE", share)
    monkeypatch.setattr(outputs, "_WHOLE_SHARE", share / 5)
    weight, scores, inputs = matrices()
    product = Product(weight, scores, inputs)
    generator = torch.Generator().manual_seed(2)
    state = product.at(torch.full((D_OUT,), 20))
    for spread in (0, 1, 3, 40):
        for _ in range(4):
            change = torch.randint(-spread, spread + 1, (D_OUT,), generator=generator)
            counts = (state.counts + change).clamp(0, D_IN)
            state = product.at(counts, near=state)
            expected = masked_product(weight, scores, inputs, counts.tolist())
            assert torch.equal(state.outputs.pruned, expected)
            assert torch.equal(state.outputs.sqnorm, expected.double().square().sum(dim=1))
            assert torch.equal(state.outputs.dot, (expected.double() * (weight @ inputs)).sum(dim=1))


def test_dense_and_empty_outputs() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, inputs = torch.randn(300, 64, generator=generator), torch.randn(64, 33, generator=generator)
    product = Product(weight, weight.abs(), inputs)
    dense = product.at(torch.zeros(300, dtype=torch.int64)).outputs
    assert torch.equal(dense.pruned, dense.dense.values)
    assert not dense.row_error.any()
    assert not product.at(torch.full((300,), 64)).outputs.pruned.any()


def test_updates_stay_close_over_many_steps() -> None:
    generator = torch.Generator().manual_seed(4)
    weight, inputs = torch.randn(64, 256, generator=generator), torch.randn(256, 48, generator=generator)
    product = Product(weight, weight.abs(), inputs)
    state = product.at(torch.full((64,), 180))
    for _ in range(30):
        change = torch.randint(-4, 5, (64,), generator=generator)
        state = product.at((state.counts + change).clamp(0, 256), near=state)
    anew = product.at(state.counts).outputs.pruned
    torch.testing.assert_close(state.outputs.pruned, anew, rtol=0, atol=1e-5 * float(anew.abs().max()))


def test_the_same_counts_are_the_same_state() -> None:
    product = Product(*matrices())
    state = product.at(torch.full((D_OUT,), 20))
    assert product.at(torch.full((D_OUT,), 20), near=state) is state


def test_half_precision_is_computed_in_float32() -> None:
    weight, scores, inputs = matrices()
    state = Product(weight.half(), scores, inputs.bfloat16()).at(torch.full((D_OUT,), 9))
    assert state.outputs.pruned.dtype == torch.float32
    assert torch.equal(state.outputs.pruned, masked_product(weight, scores, inputs, [9] * D_OUT))


def test_transposed_weights() -> None:
    weight, scores, inputs = matrices()
    product = Product(weight.t().contiguous().t(), scores, inputs)
    state = product.at(torch.full((D_OUT,), 9), near=product.at(torch.full((D_OUT,), 8)))
    assert torch.equal(state.outputs.pruned, masked_product(weight, scores, inputs, [9] * D_OUT))
