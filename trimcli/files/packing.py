"""Writing packed checkpoints (`trim.packed/1`), whose form `files.packed` describes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimcli.console import NO_PROGRESS, Progress
from trimcli.files.atomic import atomic_directory
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.directory import METADATA, PrunedLinear, WrittenModel, finish, plan_shards
from trimcli.files.packed import kept_values, packed_nbytes, tensor_digest
from trimcli.files.tensors import TensorSpec, dtype_name, write_tensors
from trimcli.methods import masks


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
            dtype = dtype_name(spec.dtype)
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
