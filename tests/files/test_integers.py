import pytest
import torch

from trimcli.files.integers import grid_specs, integer_bytes, integers_of, values_of
from trimcli.files.packed import kept_values
from trimcli.files.tensors import TensorSpec
from trimcli.methods.updates.grid import Grid

CPU = torch.device("cpu")


def rounded(wbits: int, dtype: torch.dtype, d_out: int = 7, d_in: int = 45) -> tuple[torch.Tensor, torch.Tensor, Grid]:
    """A matrix [D_out, D_in] of values of a grid, zero outside its mask, and both."""
    torch.manual_seed(wbits)
    weight, keep = torch.randn(d_out, d_in) * 0.02, torch.rand(d_out, d_in) > 0.6
    grid = Grid.empty(wbits, 16, (d_out, d_in), CPU)
    for group in range(-(-d_in // 16)):
        grid.fit(group, weight[:, group * 16 : group * 16 + 16])
    columns = [grid.values(grid.nearest(weight[:, column], column), column) for column in range(d_in)]
    return torch.stack(columns, dim=1).to(dtype) * keep, keep, grid


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wbits", [8, 4])
def test_integers_give_the_weights_to_the_bit(wbits: int, dtype: torch.dtype, transposed: bool) -> None:
    weight, keep, grid = rounded(wbits, dtype)
    if transposed:
        weight, keep = weight.T.contiguous(), keep.T.contiguous()
    values = kept_values(weight, keep)
    packed = integers_of(values, keep, grid, transposed)
    assert packed.dtype == torch.uint8
    assert len(packed) == integer_bytes(len(values), wbits) == (len(values) * wbits + 7) // 8
    assert torch.equal(values_of(packed, keep, grid, transposed, dtype), values)


def test_the_first_of_two_is_in_the_upper_half() -> None:
    grid = Grid.empty(4, 4, (1, 3), CPU)
    grid.fit(0, torch.tensor([[0.0, 7.5, 3.0]]))
    keep = torch.tensor([[True, True, True]])
    assert integers_of(torch.tensor([0.5, 7.5, 3.0]), keep, grid, False).tolist() == [0x1F, 0x60]


def test_other_weights_are_refused() -> None:
    weight, keep, grid = rounded(4, torch.float32)
    values = kept_values(weight, keep)
    values[3] += 1e-4
    with pytest.raises(ValueError, match="no values of their grid"):
        integers_of(values, keep, grid, False)


def test_other_counts_are_refused() -> None:
    weight, keep, grid = rounded(8, torch.float32)
    packed = integers_of(kept_values(weight, keep), keep, grid, False)
    with pytest.raises(ValueError, match=f"call for {len(packed)} integers, which {len(packed) - 1} bytes are not"):
        values_of(packed[:-1], keep, grid, False, torch.float32)


def test_what_a_grid_is_stored_as() -> None:
    grid = rounded(8, torch.float32)[2]
    assert grid_specs((7, 45), 16) == {"scales": TensorSpec.of(grid.scales), "zeros": TensorSpec.of(grid.zeros)}
