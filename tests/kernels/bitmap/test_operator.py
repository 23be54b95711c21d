from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from trimcli.kernels.bitmap.linear import SparseLinear
from trimcli.kernels.bitmap.operator import bitmap_linear

pytestmark = pytest.mark.usefixtures("compiled")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pruned(d_out: int, d_in: int, density: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A random matrix whose row 1 is empty and whose row 2 is full, where there are such."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    keep = torch.rand(d_out, d_in, generator=generator) < density
    keep[1:2], keep[2:3] = False, True
    return (weight * keep).to(dtype)


def assert_is_the_product(found: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Off by no more than float32 sums in any order may be, and the output's own rounding."""
    x, w = inputs.double(), weight.double()
    expected, size = x @ w.T, x.abs() @ w.abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    most = size * 2e-6 + expected.abs() * torch.finfo(inputs.dtype).eps + 1e-30
    assert bool(((found.double() - expected).abs() <= most).all())
    assert found.dtype == inputs.dtype


@settings(max_examples=150)
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 16),
    st.sampled_from([0.0, 0.02, 0.3, 0.5, 1.0]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_the_product_is_the_dense_one(
    d_out: int, d_in: int, columns: int, density: float, dtype: torch.dtype, biased: bool, seed: int
) -> None:
    weight = pruned(d_out, d_in, density, dtype, seed)
    bias = torch.randn(d_out) if biased else None
    module = SparseLinear.of(weight, None if bias is None else torch.nn.Parameter(bias))
    inputs = torch.randn(columns, d_in)
    with torch.no_grad():
        assert_is_the_product(module(inputs), inputs, weight, bias)


@pytest.mark.parametrize("values", DTYPES)
@pytest.mark.parametrize("inputs", DTYPES)
@pytest.mark.parametrize("columns", [1, 5, 16, 17, 70])
def test_inputs_and_values_of_every_dtype(values: torch.dtype, inputs: torch.dtype, columns: int) -> None:
    weight, x = pruned(33, 77, 0.3, values), torch.randn(columns, 77).to(inputs)
    assert_is_the_product(SparseLinear.of(weight)(x), x, weight)


@pytest.mark.parametrize("columns", [1, 3, 16, 17, 33])
def test_several_threads_and_several_tiles(columns: int) -> None:
    weight, x = pruned(700, 1001, 0.3, torch.bfloat16), torch.randn(columns, 1001)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_is_the_product(SparseLinear.of(weight)(x), x, weight)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(20,), (1, 1, 20), (2, 3, 20), (2, 0, 20)])
def test_inputs_of_any_dimensions(shape: tuple[int, ...]) -> None:
    weight = pruned(9, 20, 0.5, torch.float32)
    module, inputs = SparseLinear.of(weight), torch.randn(shape)
    found = bitmap_linear(inputs, module.keep, module.offsets, module.values)
    torch.testing.assert_close(found, inputs @ weight.T)


def test_no_rows_of_inputs_and_strided_ones() -> None:
    weight = pruned(9, 20, 0.5, torch.float32)
    module = SparseLinear.of(weight)
    assert module(torch.zeros(0, 20)).shape == (0, 9)
    x = torch.randn(20, 4).T
    assert_is_the_product(module(x), x, weight)


@pytest.mark.parametrize("columns", [1, 4, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_torch_knows_the_operator(columns: int, bias: bool) -> None:
    module = SparseLinear.of(pruned(9, 20, 0.5, torch.float32))
    given = (torch.randn(columns, 20), module.keep, module.offsets, module.values, torch.randn(9) if bias else None)
    opcheck(torch.ops.trimcli.bitmap_linear.default, given)


def test_compiled_in_one_graph() -> None:
    weight = pruned(9, 20, 0.5, torch.float32)
    module = SparseLinear.of(weight)
    inputs = torch.randn(2, 3, 20)
    whole = torch.compile(lambda x: module(x).relu() + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(inputs), (inputs @ weight.T).relu() + 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inputs": torch.zeros(2, 30)}, "keep bits are uint8"),
        ({"inputs": torch.zeros(())}, r"inputs are \[\.\.\., D_in\]"),
        ({"keep": torch.zeros(9, 3)}, "keep bits are uint8"),
        ({"offsets": torch.zeros(9, dtype=torch.int64)}, "row offsets are int64"),
        ({"offsets": torch.zeros(10, dtype=torch.int32)}, "row offsets are int64"),
        ({"offsets": torch.full((10,), 3)}, "do not end with the number of kept values"),
        ({"values": torch.zeros(0, dtype=torch.float64), "offsets": torch.zeros(10, dtype=torch.int64)}, "not Double"),
        ({"bias": torch.zeros(8)}, r"the bias is \[D_out\]"),
    ],
)
def test_what_is_no_packed_matrix_is_refused(wrong: dict[str, Tensor], message: str) -> None:
    module = SparseLinear.of(pruned(9, 20, 0.5, torch.float32))
    parts = {"inputs": torch.zeros(1, 20), "keep": module.keep, "offsets": module.offsets, "values": module.values}
    with pytest.raises(RuntimeError, match=message):
        bitmap_linear(**{**parts, **wrong})
    assert bitmap_linear(**parts).shape == (1, 9)


def test_infinite_inputs_reach_the_rows_that_keep_them(compiled: Path) -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = SparseLinear.of(weight)(torch.tensor([[float("inf"), 1.0]]))
    assert found[0, 0] == float("inf")
