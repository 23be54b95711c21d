from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.small_models import gpt2_config, random_model, save, skeleton_of
from trimcli.errors import OptionError
from trimcli.kernels.forms import (
    FormLinear,
    SemiStructured,
    computed,
    csr_from_parts,
    is_two_of_four,
    parts_of,
    race,
    replace_linear,
    stored_bytes,
    to_csr,
)


def half_zero(d_out: int, d_in: int, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(d_out, d_in)
    return (weight * (torch.rand(d_out, d_in) < 0.5)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_csr_is_the_matrix(dtype: torch.dtype) -> None:
    weight = half_zero(6, 10, dtype)
    weight[2] = 0
    weight[3, 4] = -0.0
    sparse = to_csr(weight)
    assert torch.equal(sparse.to_dense(), weight)
    parts = parts_of(sparse)
    assert parts["crow_indices"].dtype == parts["col_indices"].dtype == torch.int32
    assert parts["values"].dtype == dtype
    assert len(parts["values"]) == int(weight.count_nonzero())
    assert torch.equal(csr_from_parts(parts, (6, 10)).to_dense(), weight)
    kept = int(weight.count_nonzero())
    assert stored_bytes(sparse) == 4 * 7 + 4 * kept + dtype.itemsize * kept
    assert stored_bytes(weight) == 60 * dtype.itemsize


def test_parts_that_are_no_matrix_are_refused() -> None:
    parts = parts_of(to_csr(half_zero(6, 10)))
    with pytest.raises(ValueError):  # noqa: PT011 - torch's words
        csr_from_parts(parts, (6, 3))
    beyond = {**parts, "col_indices": parts["col_indices"] + 100}
    with pytest.raises(ValueError):  # noqa: PT011
        csr_from_parts(beyond, (6, 10))


@pytest.mark.parametrize("shape", [(10,), (1, 10), (5, 10), (2, 3, 10), (1, 1, 10)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_sparse_linear_is_the_linear(shape: tuple[int, ...], bias: bool) -> None:
    dense = nn.Linear(10, 6, bias=bias)
    dense.weight.data = half_zero(6, 10)
    sparse = FormLinear(to_csr(dense.weight.data), dense.bias)
    inputs = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(sparse(inputs), dense(inputs))


def test_sixteen_bits_are_computed_in_float32() -> None:
    weight = half_zero(6, 10, torch.bfloat16)
    sparse = FormLinear(computed(to_csr(weight)))
    assert sparse.weight.dtype == torch.float32
    inputs = torch.randn(3, 10).bfloat16()
    with torch.no_grad():
        found = sparse(inputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (inputs.float() @ weight.float().T).bfloat16())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2), min_size=8, max_size=8), min_size=1, max_size=4))
def test_two_of_four_is_what_it_says(rows: list[list[int]]) -> None:
    expected = all(sum(value != 0 for value in row[start : start + 4]) <= 2 for row in rows for start in (0, 4))
    assert is_two_of_four(torch.tensor(rows, dtype=torch.float32)) == expected


def test_no_groups_of_four_is_not_two_of_four() -> None:
    assert not is_two_of_four(torch.zeros(2, 6))


def test_a_race_times_both() -> None:
    weight = half_zero(6, 10)
    timed = race(weight, to_csr(weight), torch.float32)
    assert timed.dense > 0
    assert timed.sparse > 0


def test_a_replaced_linear_keeps_its_bias_and_lets_go_of_its_weight(tmp_path: Path) -> None:
    skeleton = skeleton_of(save(random_model(gpt2_config()), tmp_path / "model"))
    skeleton.load_everything()
    linear = next(iter(skeleton.linears.values()))
    inputs = torch.randn(2, linear.d_in)
    before = linear.module(inputs)
    replace_linear(skeleton, linear, to_csr(linear.weight))
    module = skeleton.model.get_submodule(linear.name)
    assert isinstance(module, FormLinear)
    torch.testing.assert_close(module(inputs), before)
    assert {parameter.device.type for parameter in linear.module.parameters()} == {"meta"}


def test_a_form_outlasts_the_turn_of_its_layer(tmp_path: Path) -> None:
    """What a walk drops, and reads again from the checkpoint for the next text, is the rest of the layer."""
    skeleton = skeleton_of(save(random_model(gpt2_config()), tmp_path / "model"))
    layer = skeleton.layers[0]
    linear = layer.linears[0]
    skeleton.load_layer(layer)
    half = linear.weight * (linear.weight > 0)
    replace_linear(skeleton, linear, to_csr(half))
    skeleton.drop_layer(layer)
    skeleton.load_layer(layer)
    module = skeleton.model.get_submodule(linear.name)
    assert isinstance(module, FormLinear)
    assert torch.equal(module.weight.to_dense(), half)
    assert module.bias is not None
    assert not any(parameter.is_meta for parameter in layer.module.parameters())


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", torch.float16, "on a CUDA GPU, and the device here is cpu"),
        ("cuda", torch.float32, r"compute in 16 bits.* float32; give --dtype bfloat16"),
    ],
)
def test_semi_structured_needs_a_gpu_and_16_bits(device: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SemiStructured(torch.device(device), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packing_for_cutlass_needs_no_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUTLASS's packing is arithmetic that any device can do; only multiplying needs its kernels."""
    kind = torch.sparse.SparseSemiStructuredTensorCUTLASS
    monkeypatch.setattr(kind, "_validate_device_dim_dtype_shape", lambda original: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    weight = two_of_four(64, 128).to(dtype)
    packer = SemiStructured(torch.device("cuda", 0), dtype)
    assert packer.document() == {"backend": "cutlass", "capability": [8, 0], "cusparselt": None}
    assert packer.fits((64, 128))
    assert not packer.fits((64, 72))
    packer.device = torch.device("cpu")
    packed = packer.pack(weight)
    assert stored_bytes(packed) == weight.nbytes * 9 // 16
    assert torch.equal(packer.from_parts(parts_of(packed), (64, 128)).to_dense(), weight)


def two_of_four(d_out: int, d_in: int) -> Tensor:
    """A random 2:4 matrix."""
    weight = torch.randn(d_out, d_in // 4, 4)
    kept = torch.rand(d_out, d_in // 4, 4).topk(2).indices
    return torch.zeros_like(weight).scatter_(2, kept, weight.gather(2, kept)).reshape(d_out, d_in)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured matrices need a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_is_the_matrix(dtype: torch.dtype) -> None:
    weight = two_of_four(64, 128).to(dtype)
    packer = SemiStructured(torch.device("cuda", 0), dtype)
    assert packer.fits((64, 128))
    packed = packer.pack(weight)
    again = packer.from_parts({name: part.cpu() for name, part in parts_of(packed).items()}, (64, 128))
    assert torch.equal(again.to_dense().cpu(), weight)
    for rows in (1, 3, 40):
        inputs = torch.randn(rows, 128, device="cuda", dtype=dtype)
        expected = nn.functional.linear(inputs, weight.cuda())
        torch.testing.assert_close(FormLinear(again)(inputs), expected, rtol=2e-2, atol=2e-2)
