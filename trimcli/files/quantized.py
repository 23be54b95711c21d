"""Quantized and compressed checkpoints read as if they were plain: what can be undone exactly is undone on reading.

The tensors tell what a checkpoint is, by name and dtype; its config only says what they leave open (the size of a
block), and a `quantization_config` over plain weights says nothing at all. Undone are

- float8 weights `K` with their scales aside, `K_scale_inv` or `K_scale`: of the tensor, a row or column, or a block;
- float8 weights of a checkpoint that has neither scales nor a `quantization_config`, which are just cast;
- compressed-tensors' bitmasks, 2:4 too: `P.compressed` (the values), `P.bitmask` (least significant bit first),
  `P.shape` and in places `P.row_offsets`, for the tensor `P.weight`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimcli.errors import InputError
from trimcli.files.forms import SIZE
from trimcli.files.quantized_forms import refuse_other_forms
from trimcli.files.shards import Shards
from trimcli.files.tensors import TensorSpec, bit_view, dtype_name, specs_of

FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
DTYPES = {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
CONFIGS = ("quantization_config", "compression_config")
# Beside a scale: of the inputs, which 16-bit weights have no use for.
INPUT_SCALES = ("input_scale", "input_scale_ub", "input_zero_point", "activation_scale", "activation_scale_inv")
BLOCK = (128, 128)


@dataclass(frozen=True)
class Decoded:
    """A tensor made on reading. parts: the stored ones that it stands for, in the first one's shard."""

    spec: TensorSpec
    parts: tuple[str, ...]
    read: Callable[[], Tensor]


class DequantizedShards(Shards):
    """Shards some of whose tensors are made from others on reading. made: key -> how."""

    def __init__(self, stored: Shards, made: Mapping[str, Decoded]) -> None:
        self._stored, self._made = stored, made
        gone = {part for one in made.values() for part in one.parts}
        at = {one.parts[0]: key for key, one in made.items()}
        files = {
            name: [at.get(key, key) for key in keys if key in at or key not in gone]
            for name, keys in stored.files.items()
        }
        self.files = {name: keys for name, keys in files.items() if keys}

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of a tensor once made."""
        return self._made[key].spec if key in self._made else self._stored.spec(key)

    def load(self, key: str) -> Tensor:
        """A tensor, made where it has to be. Raises InputError where its parts do not fit together."""
        return self._made[key].read() if key in self._made else self._stored.load(key)


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what it says of quantization, at the top or in a config within (`text_config`)."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in CONFIGS
    }


def as_plain(stored: Shards, config: Mapping[str, Any], directory: Path) -> Shards:
    """The shards of `directory`, undone where quantized. Raises InputError naming a form that cannot be, and its tool.

    config: its config.json. What is undone has the dtype that this names, bfloat16 where it names none.
    """
    specs = specs_of(stored.keys(), stored.spec)
    configs = [config, _object(config.get("text_config"))]
    quantization = next((found for one in configs for name in CONFIGS if (found := _object(one.get(name)))), {})
    refuse_other_forms({key: spec.dtype for key, spec in specs.items()}, quantization, directory)
    if bitmasks := dict(_bitmasks(stored, specs, directory)):
        stored = DequantizedShards(stored, bitmasks)
        specs = specs_of(stored.keys(), stored.spec)
    named = next((str(one[name]) for one in configs for name in ("dtype", "torch_dtype") if one.get(name)), "")
    decoder = _Float8(stored, specs, quantization, DTYPES.get(named, torch.bfloat16), directory)
    return DequantizedShards(stored, made) if (made := dict(decoder.all())) else stored


def _object(value: Any) -> Mapping[str, Any]:
    """What a config.json says in an object, nothing where there is none."""
    return value if isinstance(value, Mapping) else {}


def _bitmasks(stored: Shards, specs: Mapping[str, TensorSpec], directory: Path) -> Iterator[tuple[str, Decoded]]:
    for values in specs:
        prefix, _, kind = values.rpartition(".")
        parts = tuple(f"{prefix}.{part}" for part in ("compressed", "bitmask", "shape", "row_offsets"))
        if kind != "compressed":
            continue
        if missing := [part for part in parts[1:3] if part not in specs]:
            raise InputError(f"{directory} lacks {missing[0]}, a part of a compressed tensor; fetch the model anew.")
        shape = stored.load(parts[2]).flatten()
        if shape.dtype.is_floating_point or not 0 < len(shape) < 9 or int(shape.min()) < 0:
            raise InputError(f"{directory} holds no shape in {parts[2]}; fetch the model anew.")
        key = prefix if prefix.endswith((".weight", ".bias")) else f"{prefix}.weight"
        spec = TensorSpec(specs[values].dtype, tuple(shape.tolist()))
        there = tuple(part for part in parts if part in specs)
        yield key, Decoded(spec, there, partial(_from_bitmask, stored, parts, spec, directory))


def _from_bitmask(stored: Shards, parts: tuple[str, ...], spec: TensorSpec, directory: Path) -> Tensor:
    """The dense tensor, to the bit."""
    values, mask = bit_view(stored.load(parts[0]).flatten().contiguous()), stored.load(parts[1])
    columns = spec.shape[-1]
    fits = tuple(mask.shape) == (*spec.shape[:-1], -(-columns // 8)) and mask.dtype == torch.uint8
    keep = np.unpackbits(mask.numpy(), axis=-1, count=columns, bitorder="little").view(bool) if fits else None
    if keep is None or np.count_nonzero(keep) != len(values):
        what = f"{parts[0]} and {parts[1]} of {directory} do not make up a tensor of shape {list(spec.shape)}"
        raise InputError(f"{what}; fetch the model anew.")
    dense = np.zeros(spec.shape, values.dtype)
    dense[keep] = values
    return torch.from_numpy(dense).view(spec.dtype)


class _Float8:
    """The float8 tensors of a checkpoint. quantization: its config of that name. dtype: what they become."""

    def __init__(
        self,
        stored: Shards,
        specs: Mapping[str, TensorSpec],
        quantization: Mapping[str, Any],
        dtype: torch.dtype,
        directory: Path,
    ) -> None:
        self._stored, self._specs, self._dtype, self._directory = stored, specs, dtype, directory
        self._asked = bool(quantization)
        groups = _object(quantization.get("config_groups")).values()
        weights = [_object(_object(group).get("weights")) for group in groups]
        sizes = [quantization.get("weight_block_size"), *(one.get("block_structure") for one in weights)]
        pairs = [size for size in sizes if isinstance(size, list) and len(size) == 2]
        self._blocks = [(rows, columns) for rows, columns in pairs if SIZE.fits(rows) and SIZE.fits(columns)]

    def all(self) -> Iterator[tuple[str, Decoded]]:
        """Every float8 tensor that is a weight, with how it is read."""
        keys = [key for key, spec in self._specs.items() if spec.dtype in FLOAT8]
        scales = {key: name for key in keys for name in (f"{key}_scale_inv", f"{key}_scale") if name in self._specs}
        for key in keys:
            spec = TensorSpec(self._dtype, self._specs[key].shape)
            scale = scales.get(key)
            if scale is None and (scales or self._asked):
                what = f"{self._directory} holds {key} as {dtype_name(self._specs[key].dtype)} without its scale"
                raise InputError(f"{what} ({key}_scale_inv or {key}_scale); fetch the model anew.")
            if scale is None:
                yield key, Decoded(spec, (key,), partial(self._cast, key))
                continue
            blocks = self._block(key, scale)
            owner = key.rpartition(".")[0]
            beside = (scale, f"{key}_zero_point", *(f"{owner}.{name}" for name in INPUT_SCALES))
            parts = (key, *(name for name in beside if name in self._specs))
            yield key, Decoded(spec, parts, partial(self._scaled, key, scale, blocks))

    def _cast(self, key: str) -> Tensor:
        return self._stored.load(key).to(self._dtype)

    def _block(self, key: str, scale: str) -> tuple[int, int]:
        """How many rows and columns share a scale. Raises InputError where its shape does not tell."""
        shape, grid = self._specs[key].shape, self._grid(scale)
        (rows, columns), (down, across) = (1, 1, *shape)[-2:], grid[-2:]
        sizes = [*self._blocks, BLOCK]
        if down and across and not (rows % down or columns % across):
            sizes.append((rows // down, columns // across))
        # One axis is of every row, or it could be of anything; a stack's scales are as many stacks.
        alike = grid == (1, 1) or grid[:-2] == shape[:-2]
        if alike and (len(self._specs[scale].shape) != 1 or down in (1, rows)):
            for size in sizes:
                if (math.ceil(rows / size[0]), math.ceil(columns / size[1])) == (down, across):
                    return size
        shapes = f"{list(self._specs[scale].shape)} where {key} has {list(shape)}"
        raise InputError(f"{self._directory}: {scale} has shape {shapes}, in no blocks; fetch the model anew.")

    def _grid(self, scale: str) -> tuple[int, ...]:
        """The scales' shape, rows and columns last; those of one axis are of the rows."""
        shape = self._specs[scale].shape
        if math.prod(shape) == 1:
            return 1, 1
        return shape if len(shape) > 1 else (*shape, 1)

    def _scaled(self, key: str, scale: str, block: tuple[int, int]) -> Tensor:
        """The weights times their scales, in float32, rounded once."""
        weight, factor = self._stored.load(key).float(), self._stored.load(scale)
        zero = f"{key}_zero_point"
        if zero in self._specs and bool(self._stored.load(zero).float().any()):
            raise InputError(f"{self._directory} holds {key} with zero points, which are not supported; convert it.")
        # Exponents alone, kept as bytes.
        factor = (factor.float() - 127).exp2() if factor.dtype == torch.uint8 else factor.float()
        factor = factor.reshape(self._grid(scale))
        for axis, size in ((-2, block[0]), (-1, block[1])):
            if size > 1 and factor.shape[axis] > 1:
                factor = factor.repeat_interleave(size, axis).narrow(axis, 0, weight.shape[axis])
        return weight.mul_(factor).to(self._dtype)
