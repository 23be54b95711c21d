from pathlib import Path

import pytest
import torch

from tests.kernels.bitmap.test_operator import pruned
from tests.small_models import gpt2_config, random_model, save, skeleton_of
from trimcli.kernels.bitmap.linear import SparseLinear, bitmap_bytes, put_in_place, row_offsets
from trimcli.methods import masks


def test_what_it_holds_is_the_packed_form() -> None:
    weight = torch.tensor([[0, 1.5, 0, 0, 0, 0, 0, 0, 2], [0] * 9, [-1, 0, 0, 0, 0, 0, 0, 3, -0.0]])
    module = SparseLinear.of(weight)
    assert module.keep.tolist() == [[0b01000000, 0b10000000], [0, 0], [0b10000001, 0]]
    assert module.values.tolist() == [1.5, 2, -1, 3]
    assert module.offsets.tolist() == [0, 2, 2, 4]
    assert torch.equal(module.weight, weight)
    assert module.nbytes == bitmap_bytes((3, 9), 4, 4) == 3 * 2 + 8 * 4 + 4 * 4
    assert "in_features=9, out_features=3, bias=False, kept=4" in repr(module)


def test_offsets_count_the_bits_of_every_row() -> None:
    keep = torch.rand(50, 83) < 0.3
    counts = keep.sum(1).tolist()
    assert row_offsets(masks.pack(keep)).tolist() == [sum(counts[:row]) for row in range(51)]


@pytest.mark.parametrize(
    ("keep", "kept", "inputs", "message"),
    [
        ([[0b11000000]], 1, 3, "1 values for 2 bits set"),
        ([[0b11000000]], 2, 9, "rows of 1 bytes are no matrix with 9 inputs"),
        ([[0b11010000]], 3, 3, "bits are set beyond the 3 inputs"),
    ],
)
def test_bits_and_values_that_do_not_go_together(keep: list[list[int]], kept: int, inputs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLinear(torch.tensor(keep, dtype=torch.uint8), torch.ones(kept), inputs)


def test_its_state_is_saved_and_loaded(compiled: Path) -> None:
    module, other = (
        SparseLinear.of(pruned(9, 20, 0.5, torch.float32)),
        SparseLinear.of(pruned(9, 20, 0.5, torch.float32)),
    )
    other.values.zero_()
    other.load_state_dict(module.state_dict())
    inputs = torch.randn(2, 20)
    assert torch.equal(other(inputs), module(inputs))


@pytest.mark.parametrize("shape", [(20,), (1, 20), (2, 3, 20), (1, 1, 20)])
def test_inputs_of_any_shape(compiled: Path, shape: tuple[int, ...]) -> None:
    weight, inputs = pruned(9, 20, 0.5, torch.float32), torch.randn(shape)
    torch.testing.assert_close(SparseLinear.of(weight)(inputs), inputs @ weight.T)


def test_a_transposed_linear_is_replaced_with_its_bias(compiled: Path, tmp_path: Path) -> None:
    skeleton = skeleton_of(save(random_model(gpt2_config()), tmp_path / "model"))
    skeleton.load_everything()
    linear = next(iter(skeleton.linears.values()))
    inputs = torch.randn(2, linear.d_in)
    before = linear.module(inputs)
    put_in_place(skeleton, linear, linear.weight)
    module = skeleton.model.get_submodule(linear.name)
    assert isinstance(module, SparseLinear)
    torch.testing.assert_close(module(inputs), before)
    assert {parameter.device.type for parameter in linear.module.parameters()} == {"meta"}
