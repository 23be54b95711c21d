"""Quantized and compressed checkpoints: what is read as plain weights, what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.families import CONVERTS
from tests.small_models import llama_config, masks_for, random_model, save, skeleton_of
from trimcli.commands.apply import apply_masks
from trimcli.errors import InputError
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.masks import MaskFile

UP = "model.layers.0.mlp.up_proj"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16."""
    config = llama_config(hidden_size=64, intermediate_size=96)
    return save(random_model(config, dtype=torch.bfloat16), tmp_path_factory.mktemp("quantized") / "plain")


def changed(
    plain: Path, target: Path, change: Callable[[str, Tensor], dict[str, Tensor]], quantization: dict[str, Any] | None
) -> Path:
    """The model with every projection stored as `change(key, weight)` says."""
    shutil.copytree(plain, target)
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(plain / "model.safetensors").items():
        tensors |= change(key, tensor) if key.endswith("proj.weight") else {key: tensor}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    more = {} if quantization is None else {"quantization_config": quantization}
    (target / "config.json").write_text(json.dumps({**config, **more}))
    return target


def own(model: Path) -> dict[str, Tensor]:
    """What transformers itself loads."""
    found: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
    return found


def is_read_as(model: Path, expected: dict[str, Tensor]) -> None:
    """Everywhere alike: tensors, specs, bytes, shards, the skeleton, and a pruned directory that transformers loads."""
    checkpoint = Checkpoint.open(model)
    keys = checkpoint.keys()
    assert sorted(keys) == sorted(key for held in checkpoint.shards().values() for key in held) == sorted(expected)
    for key in keys:
        assert checkpoint.load(key).dtype == checkpoint.spec(key).dtype == torch.bfloat16
        assert torch.equal(checkpoint.load(key), expected[key]), key
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert "quantization_config" not in checkpoint.config_document
    skeleton = skeleton_of(model)
    skeleton.load_everything()
    state = skeleton.model.state_dict()
    assert all(torch.equal(state[key], expected[key].float()) for key in keys)
    assert getattr(skeleton.config, "quantization_config", None) is None

    masks_for(model, model.with_name("masks"))
    pruned = model.with_name("pruned")
    apply_masks(str(model), model.with_name("masks"), pruned)
    assert "quantization_config" not in json.loads((pruned / "config.json").read_text())
    assert not (pruned / "hf_quant_config.json").exists()
    masks = MaskFile.open(model.with_name("masks"))
    linears = {f"{name}.weight": name for name in masks.names}
    assert len(linears) == 14
    for key, tensor in own(pruned).items():
        dense = expected[key]
        assert torch.equal(tensor, dense * masks.keep(linears[key]) if key in linears else dense), key


def test_a_left_over_quantization_config_says_nothing(plain: Path, tmp_path: Path) -> None:
    """What a QLoRA merge leaves in the config of plain 16-bit weights."""
    model = changed(plain, tmp_path / "model", lambda key, weight: {key: weight}, NF4)
    is_read_as(model, load_file(plain / "model.safetensors"))


def test_a_config_alone_is_taken_for_what_it_would_hold(plain: Path, tmp_path: Path) -> None:
    model = changed(plain, tmp_path / "model", lambda key, weight: {key: weight}, NF4)
    assert "quantization_config" not in Checkpoint.open(model, weights=False).config_document


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_float8_without_scales_is_cast_as_transformers_does(dtype: torch.dtype, plain: Path, tmp_path: Path) -> None:
    if dtype is E4M3 and not CONVERTS:
        pytest.skip("transformers 4 leaves this dtype as it is, and cannot run it")
    model = changed(plain, tmp_path / "model", lambda key, weight: {key: weight.to(dtype)}, None)
    expected = own(model)
    assert expected[f"{UP}.weight"].unique().numel() < 256
    is_read_as(model, expected)


def quantize(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Float8 values and the scales of blocks of so many rows and columns, from the definition."""
    grid = torch.empty(math.ceil(weight.shape[0] / rows), math.ceil(weight.shape[1] / columns))
    values = torch.empty(weight.shape)
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            block = (slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns))
            grid[row, column] = weight[block].abs().max().float() / 448
            values[block] = weight[block].float() / grid[row, column]
    return values.to(E4M3), grid


def restore(values: Tensor, grid: Tensor, rows: int, columns: int) -> Tensor:
    """The bfloat16 weight, block by block."""
    dense = torch.empty(values.shape)
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            block = (slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns))
            dense[block] = values[block].float() * grid[row, column]
    return dense.bfloat16()


COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
BLOCKED = {"weights": {"num_bits": 8, "strategy": "block", "block_structure": [40, 24]}}
WHOLE = 10**6
# name -> rows and columns of a block (of the whole matrix's where large), what the scale is called, its shape for
# [rows, columns] of scales, and the config's word.
SCALED: dict[str, tuple[int, int, str, Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "DeepSeek's blocks": (32, 32, "weight_scale_inv", lambda grid: grid, {**FP8, "weight_block_size": [32, 32]}),
    "blocks that do not divide": (
        40,
        24,
        "weight_scale_inv",
        lambda grid: grid,
        {**FP8, "weight_block_size": [40, 24]},
    ),
    "blocks of no known size": (128, 128, "weight_scale_inv", lambda grid: grid, FP8),
    "compressed-tensors' blocks": (
        40,
        24,
        "weight_scale",
        lambda grid: grid.bfloat16(),
        {**COMPRESSED, "config_groups": {"group_0": BLOCKED}},
    ),
    "of a tensor": (WHOLE, WHOLE, "weight_scale", lambda grid: grid.reshape(()), {"quant_method": "modelopt"}),
    "of a tensor, one axis": (WHOLE, WHOLE, "weight_scale", lambda grid: grid.reshape(1), COMPRESSED),
    "of rows": (1, WHOLE, "weight_scale", lambda grid: grid.bfloat16(), COMPRESSED),
    "of rows, one axis": (1, WHOLE, "weight_scale", lambda grid: grid.flatten(), {"quant_method": "fbgemm_fp8"}),
    "of groups": (1, 16, "weight_scale", lambda grid: grid, COMPRESSED),
    "exponents": (1, 32, "weight_scale", lambda grid: (grid.log2().round() + 127).to(torch.uint8), COMPRESSED),
    "exponents in their dtype": (
        32,
        32,
        "weight_scale_inv",
        lambda grid: grid.to(torch.float8_e8m0fnu),
        {**FP8, "weight_block_size": [32, 32]},
    ),
}


@pytest.mark.parametrize("form", SCALED)
def test_float8_with_scales_aside(form: str, plain: Path, tmp_path: Path) -> None:
    rows, columns, name, shaped, quantization = SCALED[form]
    expected = dict(load_file(plain / "model.safetensors"))

    def change(key: str, weight: Tensor) -> dict[str, Tensor]:
        values, grid = quantize(weight, rows, columns)
        scale = shaped(grid)
        used = 2.0 ** (scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
        expected[key] = restore(values, used.reshape(grid.shape), rows, columns)
        owner = key.removesuffix(".weight")
        return {key: values, f"{owner}.{name}": scale, f"{owner}.input_scale": torch.ones(())}

    model = changed(plain, tmp_path / "model", change, quantization)
    (model / "hf_quant_config.json").write_text("{}")
    is_read_as(model, expected)


@pytest.mark.skipif(not CONVERTS, reason="transformers 4 wants a GPU for it")
def test_float8_blocks_are_what_transformers_reads(plain: Path, tmp_path: Path) -> None:
    def change(key: str, weight: Tensor) -> dict[str, Tensor]:
        values, grid = quantize(weight, 32, 32)
        return {key: values, f"{key}_scale_inv": grid}

    quantization = {**FP8, "weight_block_size": [32, 32]}
    model = changed(plain, tmp_path / "model", change, quantization)
    is_read_as(model, own(model))


def test_stacked_experts_have_scales_too(plain: Path, tmp_path: Path) -> None:
    shutil.copy(plain / "config.json", tmp_path)
    values, grid = quantize(torch.randn(64, 32), 16, 16)
    stack, scales = torch.stack([values, values.flip(0)]), torch.stack([grid, grid * 2])
    save_file({"a.up": stack, "a.up_scale_inv": scales}, tmp_path / "model.safetensors")
    expected = [restore(stack[place], scales[place], 16, 16) for place in range(2)]
    assert torch.equal(Checkpoint.open(tmp_path).load("a.up"), torch.stack(expected))


@pytest.mark.parametrize("shape", [(4,), (2, 64), (4, 64, 1), (2, 3, 1)])
def test_scales_of_a_stack_that_could_be_of_anything_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = {"a.up": torch.zeros(2, 64, 32).to(E4M3), "a.up_scale": torch.ones(shape)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"a\.up_scale has shape .* where a\.up has \[2, 64, 32\], in no blocks"):
        Checkpoint.open(tmp_path)


def test_scales_may_lie_in_a_shard_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": torch.full((2, 4), 3.0).to(E4M3)}, tmp_path / "one.safetensors")
    save_file({"a.weight_scale": torch.tensor([[2.0], [0.5]])}, tmp_path / "two.safetensors")
    places = {"a.weight": "one.safetensors", "a.weight_scale": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.shards() == {"one.safetensors": ["a.weight"]}
    assert checkpoint.load("a.weight").tolist() == [[6.0] * 4, [1.5] * 4]


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({}, r"up_proj\.weight as float8_e4m3fn without its scale"),
        ({"weight_scale": torch.ones(7, 1)}, r"weight_scale has shape \[7, 1\] where .* has \[96, 64\], in no blocks"),
    ],
)
def test_float8_whose_scales_do_not_fit(scale: dict[str, Tensor], message: str, plain: Path, tmp_path: Path) -> None:
    def change(key: str, weight: Tensor) -> dict[str, Tensor]:
        if key != f"{UP}.weight":
            return {key: weight}
        return {key: weight.to(E4M3), **{f"{UP}.{name}": tensor for name, tensor in scale.items()}}

    with pytest.raises(InputError, match=message):
        Checkpoint.open(changed(plain, tmp_path / "model", change, FP8))


def test_zero_points_are_refused(plain: Path, tmp_path: Path) -> None:
    def change(key: str, weight: Tensor) -> dict[str, Tensor]:
        zero = torch.full((1,), int(key == f"{UP}.weight"), dtype=torch.int8)
        return {key: weight.to(E4M3), f"{key}_scale": torch.ones(1), f"{key}_zero_point": zero}

    checkpoint = Checkpoint.open(changed(plain, tmp_path / "model", change, COMPRESSED))
    assert not [key for key in sorted(checkpoint.keys()) if "zero_point" in key]
    checkpoint.load("model.layers.0.mlp.down_proj.weight")
    with pytest.raises(InputError, match="with zero points"):
        checkpoint.load(f"{UP}.weight")


# --- bitmasks --------------------------------------------------------------------------------------------


def bitmask(prefix: str, dense: Tensor, *, two_of_four: bool = False) -> dict[str, Tensor]:
    """What compressed-tensors stores for a matrix, by its definition, value by value."""
    rows, columns = dense.shape
    mask = np.zeros((rows, -(-columns // 8)), np.uint8)
    values: list[Tensor] = []
    offsets: list[int] = []
    for row in range(rows):
        offsets.append(len(values))
        for start in range(0, columns, 4):
            group = dense[row, start : start + 4].float()
            kept = sorted(group.abs().topk(2).indices.tolist()) if two_of_four else group.nonzero().flatten().tolist()
            for column in (start + place for place in kept):
                mask[row, column // 8] |= 1 << (column % 8)
                values.append(dense[row, column])
    compressed = torch.stack(values)
    found = {f"{prefix}.compressed": compressed, f"{prefix}.bitmask": torch.from_numpy(mask)}
    if two_of_four:
        found[f"{prefix}.compressed"] = compressed.reshape(rows, columns // 2)
        return {**found, f"{prefix}.shape": torch.tensor([[rows], [columns]])}
    return {**found, f"{prefix}.shape": torch.tensor([rows, columns]), f"{prefix}.row_offsets": torch.tensor(offsets)}


def sparse(weight: Tensor, *, two_of_four: bool = False) -> Tensor:
    if not two_of_four:
        return weight.masked_fill(weight.abs() < weight.abs().float().median(), 0)
    groups = weight.reshape(len(weight), -1, 4)
    return groups.scatter(-1, groups.abs().topk(2, largest=False).indices, 0).reshape(weight.shape)


@pytest.mark.parametrize("two_of_four", [False, True])
@pytest.mark.parametrize("whole_name", [False, True])
def test_bitmasks_are_undone(two_of_four: bool, whole_name: bool, plain: Path, tmp_path: Path) -> None:
    expected = dict(load_file(plain / "model.safetensors"))

    def change(key: str, weight: Tensor) -> dict[str, Tensor]:
        expected[key] = sparse(weight, two_of_four=two_of_four)
        return bitmask(key if whole_name else key.removesuffix(".weight"), expected[key], two_of_four=two_of_four)

    form = {"format": "dense", "sparsity_config": {"format": "sparse-bitmask", "sparsity_structure": "unstructured"}}
    model = changed(plain, tmp_path / "model", change, {**form, "quant_method": "compressed-tensors"})
    is_read_as(model, expected)


def test_bitmasks_of_float8(plain: Path, tmp_path: Path) -> None:
    expected = dict(load_file(plain / "model.safetensors"))

    def change(key: str, weight: Tensor) -> dict[str, Tensor]:
        values, grid = quantize(sparse(weight), 1, WHOLE)
        expected[key] = restore(values, grid, 1, WHOLE)
        owner = key.removesuffix(".weight")
        return {**bitmask(owner, values), f"{owner}.weight_scale": grid}

    is_read_as(changed(plain, tmp_path / "model", change, COMPRESSED), expected)


def test_bitmasks_that_are_not_whole(plain: Path, tmp_path: Path) -> None:
    shutil.copy(plain / "config.json", tmp_path)
    parts = bitmask("up", sparse(torch.randn(6, 20)))
    save_file({**parts, "up.compressed": parts["up.compressed"][:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"up\.compressed and up\.bitmask of .* do not make up a tensor of shape \[6,"):
        Checkpoint.open(tmp_path).load("up.weight")
    del parts["up.bitmask"]
    save_file(parts, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks up\.bitmask, a part of a compressed tensor"):
        Checkpoint.open(tmp_path)


# --- forms that are refused ------------------------------------------------------------------------------

BYTES, INTS, FLOATS = torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int32), torch.ones(4)
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any] | None, str]] = {
    "bitsandbytes 4-bit": (
        {"a.weight": BYTES, "a.weight.absmax": BYTES, "a.weight.quant_state.bitsandbytes__nf4": BYTES},
        NF4,
        r"bitsandbytes 4-bit weights .*`model\.dequantize\(\)`",
    ),
    "bitsandbytes 8-bit": (
        {"a.weight": BYTES.to(torch.int8), "a.SCB": FLOATS},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        r"bitsandbytes 8-bit weights .*`model\.dequantize\(\)`",
    ),
    "GPTQ": ({"a.qweight": INTS, "a.qzeros": INTS, "a.g_idx": INTS}, None, "GPTQ weights .*16-bit model"),
    "AWQ": ({"a.qweight": INTS, "a.qzeros": INTS}, None, "AWQ weights .*16-bit model"),
    "MXFP4": ({"a.up_blocks": BYTES, "a.up_scales": BYTES}, None, r"MXFP4 .*Mxfp4Config\(dequantize=True\)"),
    "NVFP4 of compressed-tensors": (
        {"a.weight_packed": BYTES, "a.weight_global_scale": FLOATS, "a.weight_scale": FLOATS.to(E4M3)},
        COMPRESSED,
        r"NVFP4 weights .*run_compressed=False",
    ),
    "NVFP4 of ModelOpt": (
        {"a.weight": BYTES, "a.weight_scale": FLOATS.to(E4M3), "a.weight_scale_2": FLOATS},
        {"quant_method": "modelopt"},
        "NVFP4 weights",
    ),
    "packed integers": (
        {"a.weight_packed": INTS, "a.weight_scale": FLOATS},
        COMPRESSED,
        r"pack-quantized weights .*run_compressed=False",
    ),
    "integers": ({"a.weight": BYTES.to(torch.int8), "a.weight_scale": FLOATS}, COMPRESSED, "int-quantized weights"),
    "HQQ": ({"a.W_q": BYTES, "a.meta": FLOATS}, None, "HQQ weights"),
    "quanto": ({"a.weight._data": BYTES, "a.weight._scale": FLOATS}, None, "quanto weights"),
    "torchao": ({"a._weight_qdata": BYTES, "a._weight_scale": FLOATS}, None, "torchao weights"),
    "AQLM": ({"a.codes": INTS, "a.codebooks": FLOATS}, None, "AQLM weights"),
    "one that is not known": ({"a.weight": BYTES}, {"quant_method": "bitnet"}, "weights quantized by bitnet"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_other_forms_are_named(form: str, tmp_path: Path) -> None:
    tensors, quantization, message = REFUSED[form]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message) as raised:
        Checkpoint.open(tmp_path)
    assert str(raised.value).count("\n") == 0


def test_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.Q4_K_M.gguf").touch()
    with pytest.raises(InputError, match=r"holds GGUF weights \(model\.Q4_K_M\.gguf\), .*gguf_file"):
        Checkpoint.open(tmp_path)
