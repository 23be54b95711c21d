"""Packed checkpoints (`trim.packed/1`): pruned matrices as keep bits and the kept values.

A matrix whose checkpoint name is `K` is stored as `K.keep`, uint8 [rows, ceil(columns / 8)], the keep bits of
the matrix *as stored* (GPT-2's Conv1D: [D_in, D_out]), most significant bit first, and `K.values`, the kept
weights in row order in the stored dtype. Every other tensor, and a matrix that would not get smaller, stays
as it is. The shards are called `packed-00001-of-0000N.safetensors`, so that nothing takes them for a model's;
`trim.json` says under `packed` which shard of the dense model each stands for, and of every tensor its shard,
dtype, shape, `kept` (number of stored values, null where stored as is) and the SHA-256 of its dense bytes,
checked whenever it is read.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimcli import masks
from trimcli.artifacts import (
    MARK,
    PACKED,
    TensorSpec,
    atomic_directory,
    open_tensors,
    read_json,
    write_tensors,
)
from trimcli.checkpoint import Checkpoint, natural
from trimcli.console import NO_PROGRESS, Progress
from trimcli.directory import METADATA, PrunedLinear, WrittenModel, bit_view, finish, plan_shards
from trimcli.errors import InputError
from trimcli.seal import is_intact

# Weights picked or placed at a time: their indices take no more than 8 MiB.
BLOCK = 1 << 20


def kept_values(weight: Tensor, keep: Tensor) -> Tensor:
    """The weights [n_kept] that `keep` keeps, in row order.

    weight: [rows, columns], any dtype, CPU. keep: bool [rows, columns].
    """
    bits = bit_view(weight.contiguous()).reshape(-1)
    values = np.empty(int(keep.count_nonzero()), bits.dtype)
    start = 0
    for block, found in _kept_places(keep):
        values[start : start + len(found)] = bits[block][found]
        start += len(found)
    return torch.from_numpy(values).view(weight.dtype)


def decode(packed: Tensor, values: Tensor, columns: int) -> Tensor:
    """The matrix [rows, columns] of packed keep bits and `kept_values`, +0.0 where nothing was kept.

    packed: uint8 [rows, ceil(columns / 8)], of `masks.pack`. values: [n_kept], CPU. The kept weights are
    those that went in, to the bit. Raises ValueError where the bits call for more or fewer values or columns.
    """
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


def packed_nbytes(spec: TensorSpec, kept: int) -> int:
    """Bytes that a matrix of `spec` takes when `kept` of its weights are stored packed."""
    rows, columns = spec.shape
    return rows * -(-columns // 8) + kept * spec.dtype.itemsize


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes, hexadecimal."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


class PackedReader:
    """A packed directory read as if it were dense.

    document: its `trim.json`. files: shard of the dense model -> the tensors in it.
    """

    def __init__(self, directory: Path) -> None:
        """Raises InputError (a shard missing, truncated or lacking a tensor; `trim.json` edited)."""
        self.document = read_json(directory / MARK, PACKED)
        if not is_intact(self.document):
            raise InputError(f"{directory / MARK} was changed after trim wrote it; pack the model anew.")
        self._directory = directory
        record = self.document["packed"]
        self._tensors: dict[str, dict[str, Any]] = record["tensors"]
        self._handles = {name: open_tensors(directory / name) for name in record["shards"]}
        stored = {name: set(handle.keys()) for name, handle in self._handles.items()}
        self.files: dict[str, list[str]] = {dense: [] for dense in record["shards"].values()}
        for key, entry in self._tensors.items():
            parts = [key] if entry["kept"] is None else [f"{key}.keep", f"{key}.values"]
            if not stored[entry["shard"]].issuperset(parts):
                raise InputError(f"{directory / entry['shard']} lacks {key}; fetch or pack the model anew.")
            self.files[record["shards"][entry["shard"]]].append(key)

    def keys(self) -> list[str]:
        """Names of all tensors, in natural order."""
        return sorted(self._tensors, key=natural)

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of a tensor once decoded."""
        entry = self._tensors[key]
        return TensorSpec(getattr(torch, entry["dtype"]), tuple(entry["shape"]))

    def load(self, key: str) -> Tensor:
        """A tensor, decoded. Raises InputError if it is not what was written."""
        try:
            tensor = self._decoded(key)
        except ValueError:
            tensor = None
        entry = self._tensors[key]
        if tensor is None or list(tensor.shape) != entry["shape"] or tensor_digest(tensor) != entry["sha256"]:
            where = self._directory / entry["shard"]
            raise InputError(f"{key} in {where} is not what was packed; fetch or pack the model anew.")
        return tensor

    def _decoded(self, key: str) -> Tensor:
        entry = self._tensors[key]
        handle = self._handles[entry["shard"]]
        if entry["kept"] is None:
            found: Tensor = handle.get_tensor(key)
            return found
        return decode(handle.get_tensor(f"{key}.keep"), handle.get_tensor(f"{key}.values"), entry["shape"][1])


def write_packed(
    checkpoint: Checkpoint,
    target: Path,
    weight_of: Callable[[str], Tensor | None],
    keep_of: Callable[[str], Tensor],
    document: Mapping[str, Any],
    linears: Mapping[str, PrunedLinear],
    *,
    force: bool = False,
    max_shard_size: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> WrittenModel:
    """Write a packed directory, one tensor in memory at a time; the directory appears when complete.

    weight_of, document (`trim.packed/1`), linears and max_shard_size (of the dense shards; each gives one
    packed shard) as for `directory.write_model`. keep_of(name): bool [D_out, D_in] of a linear of `linears`;
    `weight_of` is zero outside it. Raises OutputExists, InputError (no such parent directory).
    """
    shards = plan_shards(checkpoint, max_shard_size)
    writer = _PackedWriter(checkpoint, weight_of, keep_of, linears)
    total = sum(len(keys) for keys in shards.values())
    with atomic_directory(target, force=force) as directory, progress.task("packing", total) as advance:
        places = {}
        for number, (shard, keys) in enumerate(shards.items(), start=1):
            name = f"packed-{number:05d}-of-{len(shards):05d}.safetensors"
            places[name] = shard
            specs = writer.plan(name, keys)
            write_tensors(directory / name, specs, lambda part: writer.tensor(part, advance), METADATA)
        packed = {"shards": places, "tensors": writer.tensors}
        entries = {name: writer.entries[name] for name in linears}
        return finish(directory, checkpoint, shards, {**document, "packed": packed}, entries)


class _PackedWriter:
    """Hands out the stored tensors of a packed directory, noting `tensors` and `entries` for `trim.json`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weight_of: Callable[[str], Tensor | None],
        keep_of: Callable[[str], Tensor],
        linears: Mapping[str, PrunedLinear],
    ) -> None:
        self._checkpoint = checkpoint
        self._weight_of = weight_of
        self._keep_of = keep_of
        self._linears = linears
        self._names = {linear.key: name for name, linear in linears.items()}
        self._parts: dict[str, tuple[str, str]] = {}
        self.tensors: dict[str, dict[str, Any]] = {}
        self.entries: dict[str, dict[str, Any]] = {}

    def plan(self, shard: str, keys: list[str]) -> dict[str, TensorSpec]:
        """What the packed shard `shard` will hold for the tensors `keys`."""
        specs: dict[str, TensorSpec] = {}
        for key in keys:
            spec = self._checkpoint.spec(key)
            kept = int(self._keep(key).count_nonzero()) if key in self._names else None
            if kept is not None and packed_nbytes(spec, kept) >= spec.nbytes:
                kept = None
            dtype = str(spec.dtype).removeprefix("torch.")
            self.tensors[key] = {"shard": shard, "dtype": dtype, "shape": list(spec.shape), "kept": kept}
            parts = {key: spec}
            if kept is not None:
                rows, columns = spec.shape
                parts = {
                    f"{key}.keep": TensorSpec(torch.uint8, (rows, -(-columns // 8))),
                    f"{key}.values": TensorSpec(spec.dtype, (kept,)),
                }
            for part in parts:
                self._parts[part] = (key, part.removeprefix(key))
            specs.update(parts)
        return specs

    def tensor(self, part: str, advance: Callable[..., None]) -> Tensor:
        """One stored tensor: a whole one, keep bits or kept values."""
        key, kind = self._parts[part]
        if kind == ".keep":
            return masks.pack(self._keep(key))
        advance()
        replaced = self._weight_of(key)
        value = self._checkpoint.load(key) if replaced is None else replaced
        self.tensors[key]["sha256"] = tensor_digest(value)
        name = self._names.get(key)
        if name is not None:
            self.entries[name] = self._linears[name].entry(value)
        return kept_values(value, self._keep(key)) if kind == ".values" else value

    def _keep(self, key: str) -> Tensor:
        """The mask as the matrix is stored."""
        name = self._names[key]
        keep = self._keep_of(name)
        return keep.T.contiguous() if self._linears[name].transposed else keep
