"""The divergence's gradient, against autograd through its definition."""

import pytest
import torch
from torch import Tensor

from trimcli.methods.divergence import PIECE, divergence


def defined(sure: Tensor, given: Tensor) -> Tensor:
    """KL(p || q) of the softmaxes, over what the first does not rule out."""
    wanted, found = sure.log_softmax(dim=-1), given.log_softmax(dim=-1)
    allowed = ~wanted.isneginf()
    return (wanted[allowed].exp() * (wanted[allowed] - found[allowed])).sum()


@pytest.mark.parametrize("ruled_out", [False, True])
def test_value_and_gradient_are_those_of_the_definition(ruled_out: bool) -> None:
    torch.manual_seed(0)
    sure, given = torch.randn(2, 3, 4, 11)
    if ruled_out:
        sure[..., 5] = given[..., 5] = -torch.inf
    exact = given.double().requires_grad_()
    wanted = defined(sure.double(), exact)
    wanted.backward()
    assert exact.grad is not None
    given.requires_grad_()
    found = divergence(sure, given)
    assert found.shape == (3, 4)
    assert found.sum().item() == pytest.approx(wanted.item(), rel=1e-5)
    (3 * found).sum().backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad, 3 * exact.grad.nan_to_num().float(), rtol=1e-5, atol=1e-6)


def test_gradients_have_the_dtype_of_what_was_given() -> None:
    sure, given = torch.randn(2, 7).bfloat16(), torch.randn(2, 7).bfloat16().requires_grad_()
    divergence(sure, given).sum().backward()
    assert given.grad is not None
    assert given.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("learns", [False, True])
def test_logits_are_taken_piece_by_piece(learns: bool) -> None:
    torch.manual_seed(0)
    tokens, vocabulary = 5, PIECE // 2 - 1
    sure, given = torch.randn(2, 1, vocabulary, tokens).transpose(-1, -2)
    given = given.detach().requires_grad_(learns)
    found = divergence(sure, given)
    if learns:
        found.sum().backward()
    for token in range(tokens):
        one = given[:, token].detach().double().requires_grad_()
        wanted = defined(sure[:, token].double(), one)
        wanted.backward()
        assert found[0, token].item() == pytest.approx(wanted.item(), rel=1e-5)
        if learns:
            assert given.grad is not None
            assert one.grad is not None
            torch.testing.assert_close(given.grad[:, token], one.grad.float(), rtol=1e-4, atol=1e-9)
