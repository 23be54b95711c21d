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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimcli.errors import InputError
from trimcli.files.atomic import MARK
from trimcli.files.documents import read_json
from trimcli.files.manifest import PACKED, is_intact
from trimcli.files.tensors import TensorSpec, bit_view, natural, open_tensors
from trimcli.methods import masks

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
