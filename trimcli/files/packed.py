"""Packed checkpoints (`trim.packed/1`): pruned matrices as keep bits and the kept values.

A matrix `K` is stored as `K.keep`, uint8 [rows, ceil(columns / 8)], the keep bits of the matrix *as stored* (GPT-2's
Conv1D: [D_in, D_out]), most significant bit first, and `K.values`, the kept weights in row order in the stored dtype;
of a stack [E, ., .] one matrix below the other, of a 1x1 convolution [D_out, D_in, 1, 1] as [D_out, D_in].
A matrix whose kept weights were rounded to `wbits` bits has in place of values `K.integers`, uint8, of 4 bits the first
in a byte's upper half, and of its grid, for each row of [D_out, D_in] and each `group_size` inputs, `K.scales`,
bfloat16, and `K.zeros`, uint8: integer q stands for (q - zero) * scale in float32, rounded to the stored dtype. Every
other tensor, and a matrix that would not get smaller, stays as it is.

`trim.json` says under `packed` which shard of the dense model each `packed-00001-of-0000N.safetensors` stands for, and
of every tensor its shard, dtype, shape, `kept` (number of stored values, null if stored as is), `wbits`, `group_size`
and whether it is `transposed` where there are integers, and the SHA-256 of its dense bytes, checked on every read.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimcli.errors import InputError
from trimcli.files.atomic import MARK
from trimcli.files.documents import read_json
from trimcli.files.forms import (
    COUNT,
    FLAG,
    PRUNED_LINEAR,
    PRUNING,
    SIZE,
    TEXT,
    TRAINING,
    WBITS,
    WHOLE_MODEL,
    Each,
    Must,
    check_form,
)
from trimcli.files.integers import grid_specs, integer_bytes, values_of
from trimcli.files.manifest import PACKED, is_intact
from trimcli.files.masks import keep_spec
from trimcli.files.shards import SafeShards, Shards, shard_names
from trimcli.files.tensors import DTYPE, NAMED, TensorSpec, bit_view, tensor_digest
from trimcli.methods import masks
from trimcli.methods.updates.grid import Grid

PLAIN = {"shard": Must(TEXT), "dtype": Must(DTYPE), "shape": Must([Must(COUNT)]), "kept": COUNT, "sha256": Must(TEXT)}
ROUNDED = {**PLAIN, "kept": Must(COUNT), "wbits": WBITS, "group_size": Must(SIZE), "transposed": Must(FLAG)}


def _tensor(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The form of what is said of a tensor."""
    return PLAIN if entry.get("wbits") is None else ROUNDED


FORM = {
    **PRUNING,
    "packed": Must({"shards": Must(Each(Must(TEXT))), "tensors": Must(Each(Must(_tensor)))}),
    "linears": Must(Each(Must(PRUNED_LINEAR))),
    "model": Must(WHOLE_MODEL),
    "pruning": PRUNING,
    "training": TRAINING,
}
# Weights picked or placed at a time: their indices take no more than 8 MiB.
BLOCK = 1 << 20


def kept_values(weight: Tensor, keep: Tensor) -> Tensor:
    """The weights [n_kept] that `keep` keeps, in row order. weight, keep (bool): [rows, columns], on the CPU."""
    bits = bit_view(weight.contiguous()).reshape(-1)
    values = np.empty(int(keep.count_nonzero()), bits.dtype)
    start = 0
    for block, found in _kept_places(keep):
        values[start : start + len(found)] = bits[block][found]
        start += len(found)
    return torch.from_numpy(values).view(weight.dtype)


def decode(packed: Tensor, values: Tensor, columns: int) -> Tensor:
    """The matrix [rows, columns] of `masks.pack`'s bits and `kept_values` [n_kept], to the bit. Raises ValueError."""
    keep = masks.unpack(packed, columns)
    if int(keep.count_nonzero()) != len(values):
        raise ValueError(f"the keep bits call for {int(keep.count_nonzero())} values, not {len(values)}.")
    bits = bit_view(values)
    dense = np.zeros(keep.numel(), bits.dtype)
    start = 0
    for block, found in _kept_places(keep):
        dense[block][found] = bits[start : start + len(found)]
        start += len(found)
    return torch.from_numpy(dense).view(values.dtype).reshape(keep.shape)


def _kept_places(keep: Tensor) -> Iterator[tuple[slice, np.ndarray[Any, Any]]]:
    """Blocks of the flattened matrix, and the places kept within each."""
    flags = keep.contiguous().numpy().reshape(-1)
    for start in range(0, len(flags), BLOCK):
        block = slice(start, start + BLOCK)
        yield block, np.flatnonzero(flags[block])


def as_matrix(shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns that a tensor of this shape is packed as; None for what is no matrix and no stack of them."""
    if len(shape) == 4 and tuple(shape[2:]) == (1, 1):
        return shape[0], shape[1]
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) in (2, 3) else None


def packed_specs(spec: TensorSpec, entry: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """What a matrix of `spec` is stored as: by the end of its tensors' names. entry: what `trim.json` says of it."""
    rows, columns = as_matrix(spec.shape) or (0, 0)
    keep = {"keep": keep_spec((rows, columns))}
    if entry.get("wbits") is None:
        return {**keep, "values": TensorSpec(spec.dtype, (entry["kept"],))}
    shape = (columns, rows) if entry["transposed"] else (rows, columns)
    integers = TensorSpec(torch.uint8, (integer_bytes(entry["kept"], entry["wbits"]),))
    return {**keep, "integers": integers, **grid_specs(shape, entry["group_size"])}


def stored_parts(key: str, entry: Mapping[str, Any]) -> list[str]:
    """Names of the stored tensors that make up a tensor. entry: what `trim.json` says of it."""
    if entry["kept"] is None:
        return [key]
    rounded = entry.get("wbits") is not None
    return [f"{key}.{part}" for part in (("keep", "integers", "scales", "zeros") if rounded else ("keep", "values"))]


class PackedReader(Shards):
    """A packed directory read as if dense. Raises InputError for a shard missing or damaged, or an edited mark."""

    def __init__(self, directory: Path) -> None:
        mark = directory / MARK
        self.document = read_json(mark, PACKED)
        if not is_intact(self.document):
            raise InputError(f"{mark} was changed after trim wrote it; pack the model anew.")
        check_form(self.document, FORM, mark, "manifest")
        self._directory = directory
        tensors = self.document["packed"]["tensors"]
        self._tensors: dict[str, dict[str, Any]] = {key: {"kept": None, **entry} for key, entry in tensors.items()}
        dense: dict[str, str] = self.document["packed"]["shards"]
        shard_names([*dense, *dense.values(), *(entry["shard"] for entry in self._tensors.values())], mark)
        if odd := next((name for name in (*dense, *dense.values()) if not name.endswith(".safetensors")), None):
            raise InputError(f"{mark} names {odd!r}, which is no shard; pack the model anew.")
        self._stored = SafeShards(directory, dense)
        self.files = {name: [] for name in dense.values()}
        for key, entry in self._tensors.items():
            shard = entry["shard"]
            if not self._is_there(key):
                raise InputError(f"{directory / shard} lacks {key}; fetch or pack the model anew.")
            self.files[dense[shard]].append(key)
        for name, linear in self.document["linears"].items():
            shape = linear["shape"][::-1] if linear["transposed"] else linear["shape"]
            stored = self._tensors.get(linear["key"], {}).get("shape")
            if stored and stored[2:] == [1, 1]:  # a convolution of single places
                stored = stored[:2]
            if stored and (place := linear.get("place")) is not None:
                stored = stored[1:] if place < stored[0] else None
            if shape != stored:
                raise InputError(f"{mark} lists no tensor for {name}; pack the model anew.")

    def _is_there(self, key: str) -> bool:
        """Whether the shard of a tensor has what it is stored as, of the dtypes and shapes that takes."""
        entry, spec = self._tensors[key], self.spec(key)
        parts = stored_parts(key, entry)
        if any(self._stored.home.get(part) != entry["shard"] for part in parts):
            return False
        specs = [spec]
        if entry["kept"] is not None:
            if as_matrix(spec.shape) is None or (len(spec.shape) > 2 and entry.get("wbits") is not None):
                return False
            specs = list(packed_specs(spec, entry).values())
        return [self._stored.spec(part) for part in parts] == specs

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of a tensor once decoded."""
        entry = self._tensors[key]
        return TensorSpec(NAMED[entry["dtype"]], tuple(entry["shape"]))

    def nbytes(self, key: str) -> int:
        """Bytes of what a tensor is stored as."""
        return sum(self._stored.spec(part).nbytes for part in stored_parts(key, self._tensors[key]))

    def keep_bits(self, key: str) -> Tensor | None:
        """Which weights a packed matrix keeps, bool, of its stored shape; None for what is stored as it is."""
        entry = self._tensors[key]
        if entry["kept"] is None:
            return None
        _, columns = as_matrix(entry["shape"]) or (0, 0)
        return masks.unpack(self._stored.load(stored_parts(key, entry)[0]), columns).view(entry["shape"])

    def load(self, key: str) -> Tensor:
        """A tensor, decoded. Raises InputError if it is not what was written."""
        entry = self._tensors[key]
        parts = [self._stored.load(part) for part in stored_parts(key, entry)]
        with contextlib.suppress(ValueError):
            tensor = parts[0] if entry["kept"] is None else self._decoded(entry, *parts)
            if tensor_digest(tensor) == entry["sha256"]:
                return tensor
        where = self._directory / entry["shard"]
        raise InputError(f"{key} in {where} is not what was packed; fetch or pack the model anew.")

    def _decoded(self, entry: Mapping[str, Any], bits: Tensor, values: Tensor, *grid: Tensor) -> Tensor:
        """A matrix of the stored tensors of `packed_specs`. Raises ValueError."""
        _, columns = as_matrix(entry["shape"]) or (0, 0)
        if grid:
            scales, zeros = grid
            found = Grid(entry["wbits"], entry["group_size"], scales, zeros)
            keep = masks.unpack(bits, columns)
            values = values_of(values, keep, found, entry["transposed"], NAMED[entry["dtype"]])
        return decode(bits, values, columns).view(entry["shape"])
