"""The products in Triton: compiled where there is a CUDA device, and interpreted in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck

from tests.kernels.bitmap.test_operator import DTYPES, assert_is_the_product, pruned
from trimcli.errors import ResourceError
from trimcli.kernels.bitmap import operator
from trimcli.kernels.bitmap.linear import SparseLinear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if CUDA else "cpu")
needs_gpu = pytest.mark.skipif(not CUDA, reason="compiled products in Triton need a CUDA GPU")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@pytest.fixture(scope="module")
def gpu() -> Any:
    """The module, whose functions run on `DEVICE`."""
    if not (INTERPRETED or CUDA):
        pytest.skip("products in Triton need a CUDA GPU or Triton's interpreter")
    pytest.importorskip("triton")
    from trimcli.kernels.bitmap import gpu

    return gpu


def product(gpu: Any, weight: Tensor, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
    """Inputs times the packed matrix on `DEVICE`, back on the CPU."""
    module = SparseLinear.of(weight).to(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED and weight.dtype == torch.bfloat16:
            # The interpreter's blocks of bfloat16 are multiplied as integers; those of float16 take the same path.
            patch.setattr(gpu, "DOTTED_COLUMNS", gpu.MOST_COLUMNS + 1)
        added = None if bias is None else bias.to(DEVICE)
        found: Tensor = gpu.multiply(inputs.to(DEVICE), module.keep, module.offsets, module.values, added)
    return found.cpu()


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_everything_here_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[3]
    found = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert int(found.stdout.rpartition("\n=")[2].split(" passed")[0].split()[-1]) > 50, found.stdout


@settings(max_examples=20 if INTERPRETED else 40, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 300),
    st.integers(1, 16),
    st.sampled_from([0.0, 0.02, 0.3, 0.5, 1.0]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_the_product_is_the_dense_one(
    gpu: Any,
    d_out: int,
    d_in: int,
    columns: int,
    density: float,
    dtype: torch.dtype,
    as_stored: bool,
    biased: bool,
    seed: int,
) -> None:
    weight, inputs = pruned(d_out, d_in, density, dtype, seed), torch.randn(columns, d_in)
    inputs, bias = inputs.to(dtype if as_stored else torch.float32), torch.randn(d_out) if biased else None
    assert_is_the_product(product(gpu, weight, inputs, bias), inputs, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 4, 5, 8, 16, 17] if INTERPRETED else [*range(1, 18), 70])
def test_every_dtype_and_number_of_columns(gpu: Any, dtype: torch.dtype, columns: int) -> None:
    """Several blocks of rows and of bytes; row 1 is empty and row 2 is full."""
    weight, inputs = pruned(18, 300, 0.3, dtype), torch.randn(columns, 300).to(dtype)
    assert_is_the_product(product(gpu, weight, inputs), inputs, weight)


@pytest.mark.parametrize("values", DTYPES)
@pytest.mark.parametrize("inputs", DTYPES)
@pytest.mark.parametrize("columns", [1, 5, 17])
def test_inputs_and_values_of_every_dtype(gpu: Any, values: torch.dtype, inputs: torch.dtype, columns: int) -> None:
    weight, x = pruned(33, 77, 0.3, values), torch.randn(columns, 77).to(inputs)
    assert_is_the_product(product(gpu, weight, x), x, weight)


@pytest.mark.parametrize("columns", [1, 3])
def test_blocks_of_several_rows_and_warps(gpu: Any, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = pruned(9, 700, 0.3, torch.float16), torch.randn(columns, 700).half()
    for blocks in (gpu.Blocks(2, 32, 1), gpu.Blocks(4, 64, 2)):
        monkeypatch.setattr(gpu, "product_blocks", lambda rows, columns, blocks=blocks: blocks)
        assert_is_the_product(product(gpu, weight, inputs), inputs, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 20), (33, 77), (5, 1000)])
def test_the_decoded_matrix_is_the_matrix(gpu: Any, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = pruned(*shape, 0.3, dtype)
    module = SparseLinear.of(weight).to(DEVICE)
    found = gpu.decoded(module.keep, module.offsets, module.values, shape[1], dtype)
    assert torch.equal(found.cpu(), weight)


def test_no_rows_of_inputs_and_strided_ones(gpu: Any) -> None:
    weight = pruned(9, 20, 0.5, torch.float32)
    assert product(gpu, weight, torch.zeros(0, 20)).shape == (0, 9)
    x = torch.randn(20, 4).T
    assert_is_the_product(product(gpu, weight, x), x, weight)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inputs": torch.zeros(2, 30)}, "keep bits are uint8"),
        ({"inputs": torch.zeros(20)}, r"inputs are \[n, D_in\]"),
        ({"keep": torch.zeros(9, 3)}, "keep bits are uint8"),
        ({"offsets": torch.zeros(9, dtype=torch.int64)}, "row offsets are int64"),
        ({"values": torch.zeros(3, 3)}, "kept values are contiguous, of one dimension"),
        ({"values": torch.zeros(9, dtype=torch.float64)}, r"not torch\.float64"),
        ({"bias": torch.zeros(8)}, r"the bias is \[D_out\]"),
        ({"bias": torch.zeros(9, device="meta")}, r"the packed matrix is on meta"),
    ],
)
def test_what_is_no_packed_matrix_is_refused(gpu: Any, wrong: dict[str, Tensor], message: str) -> None:
    module = SparseLinear.of(pruned(9, 20, 0.5, torch.float32))
    parts = {"inputs": torch.zeros(1, 20), "keep": module.keep, "offsets": module.offsets, "values": module.values}
    given = {**parts, **wrong}
    on_device = {name: one if one.device.type == "meta" else one.to(DEVICE) for name, one in given.items()}
    with pytest.raises(RuntimeError, match=message):
        gpu.multiply(**on_device)


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trimcli.kernels.bitmap.gpu", None)
    with pytest.raises(ResourceError, match=r"cannot be compiled here: .*; install triton and a C compiler\.$"):
        operator.try_on_gpu(torch.device("cuda"))


def test_where_the_device_fails_it_says_so(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise OSError("Failed to find a C compiler\nfor this")

    monkeypatch.setattr(gpu, "multiply", failing)
    with pytest.raises(ResourceError, match=r"here: Failed to find a C compiler; install triton"):
        operator.try_on_gpu(DEVICE)


@needs_gpu
@pytest.mark.parametrize("columns", [1, 4, 16, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_torch_knows_the_operator(columns: int, bias: bool) -> None:
    module = SparseLinear.of(pruned(9, 20, 0.5, torch.bfloat16)).to(DEVICE)
    added = torch.randn(9, device=DEVICE) if bias else None
    given = (torch.randn(columns, 20, device=DEVICE), module.keep, module.offsets, module.values, added)
    opcheck(torch.ops.trimcli.bitmap_linear.default, given)


@needs_gpu
def test_compiled_in_one_graph() -> None:
    weight = pruned(9, 20, 0.5, torch.float32)
    module, inputs = SparseLinear.of(weight).to(DEVICE), torch.randn(2, 3, 20)
    whole = torch.compile(lambda x: module(x).relu() + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(inputs.to(DEVICE)).cpu(), (inputs @ weight.T).relu() + 1)


@needs_gpu
@pytest.mark.parametrize("columns", [1, 16, 40])
def test_nothing_is_waited_for(columns: int) -> None:
    """A captured graph would not take it; replayed, it multiplies what its inputs hold by then."""
    weight = pruned(70, 600, 0.3, torch.bfloat16)
    module = SparseLinear.of(weight, nn.Parameter(torch.randn(70).bfloat16(), requires_grad=False)).to(DEVICE)
    inputs = torch.zeros(columns, 600, dtype=torch.bfloat16, device=DEVICE)
    module(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = module(inputs)
    inputs.copy_(torch.randn(columns, 600))
    graph.replay()
    torch.testing.assert_close(outputs, module(inputs))
    assert outputs.abs().max() > 1


@needs_gpu
@pytest.mark.parametrize("columns", [1, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [0.5, 0.7, 0.8])
def test_a_large_matrix(gpu: Any, columns: int, dtype: torch.dtype, zeros: float) -> None:
    weight, inputs = pruned(4100, 3584, 1 - zeros, dtype), torch.randn(columns, 3584).to(dtype)
    module = SparseLinear.of(weight).to(DEVICE)
    x, w = inputs.to(DEVICE), weight.to(DEVICE)
    if columns > gpu.MOST_COLUMNS:  # torch's own product of the same weights, which in 16 bits is no float32 sum
        torch.testing.assert_close(module(x), nn.functional.linear(x, w))
        return
    expected = x.double() @ w.double().T
    size = x.double().abs() @ w.double().abs().T
    most = size * 4e-6 + expected.abs() * torch.finfo(dtype).eps
    assert bool(((module(x).double() - expected).abs() <= most).all())
