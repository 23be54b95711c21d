"""Writing packed checkpoints (`trim.packed/1`), whose form `files.packed` describes."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimcli.errors import MismatchError
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.directory import PrunedLinear, PrunedTensors, numbered
from trimcli.files.integers import integers_of
from trimcli.files.packed import as_matrix, kept_values, packed_specs, stored_parts
from trimcli.files.tensors import TensorSpec, dtype_name, tensor_digest
from trimcli.methods import masks
from trimcli.methods.updates.grid import Grid


class PackedTensors(PrunedTensors):
    """One shard for each of the dense model. keep_of(name): a mask outside which `weight_of` is zero.

    grid_of(name): of whose values a linear's kept weights are, None where they may be any. What is stored raises
    MismatchError where they are none of its values.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weight_of: Callable[[str], Tensor | None],
        linears: Mapping[str, PrunedLinear],
        keep_of: Callable[[str], Tensor],
        grid_of: Callable[[str], Grid | None] = lambda _: None,
    ) -> None:
        super().__init__(checkpoint, weight_of, linears, keep_of)
        self._mask_of, self._grid_of = keep_of, grid_of
        self._records: dict[str, dict[str, Any]] = {}
        self._homes: dict[str, str] = {}

    def plan(self, shards: Mapping[str, list[str]]) -> dict[str, dict[str, TensorSpec]]:
        """File name -> the tensors that it is to hold: whole ones, keep bits and kept values."""
        files = zip(numbered("packed", len(shards)), shards.values(), strict=True)
        return {file: dict(part for key in keys for part in self._parts(file, key)) for file, keys in files}

    def _parts(self, file: str, key: str) -> Iterable[tuple[str, TensorSpec]]:
        spec = self.checkpoint.spec(key)
        specs: list[TensorSpec] = [spec]
        record: dict[str, Any] = {
            "shard": file,
            "dtype": dtype_name(spec.dtype),
            "shape": list(spec.shape),
            "kept": None,
        }
        if key in self.names and as_matrix(spec.shape):
            mine = [self.linears[name] for name in self.names[key]]
            packed = {**record, "kept": math.prod(spec.shape) - sum(linear.pruned for linear in mine)}
            if grid := self._grid(key):
                packed |= {"wbits": grid.wbits, "group_size": grid.group_size, "transposed": mine[0].transposed}
            parts = list(packed_specs(spec, packed).values())
            if sum(part.nbytes for part in parts) < spec.nbytes:
                specs, record = parts, packed
        self._records[key] = record
        names = stored_parts(key, record)
        self._homes.update(dict.fromkeys(names, key))
        return zip(names, specs, strict=True)

    def stored(self, name: str) -> Tensor:
        """A tensor of `plan`."""
        key = self._homes[name]
        part, grid = name.removeprefix(f"{key}."), self._grid(key)
        if part == "keep":
            return masks.pack(self._keep(key))
        if grid is not None and part in ("scales", "zeros"):
            return grid.scales if part == "scales" else grid.zeros
        value = self.pruned(key)
        self._records[key]["sha256"] = tensor_digest(value)
        if name == key:
            return value
        keep = self._keep(key)
        values = kept_values(value, keep)
        if grid is None:
            return values
        try:
            return integers_of(values, keep, grid, self.linears[self.names[key][0]].transposed)
        except ValueError:
            whose = f"the weights of {self.names[key][0]} in {self.checkpoint.id}"
            what = f"{whose} are not those that its masks were made with"
            raise MismatchError(f"{what}; use what prune --save-model wrote.") from None

    def _keep(self, key: str) -> Tensor:
        """The mask as the tensor is stored, of `as_matrix`; of a stack all that is no pruned matrix's is kept."""
        shape = self.checkpoint.spec(key).shape
        keep = torch.ones(shape, dtype=torch.bool)
        for name in self.names[key]:
            self.linears[name].within(keep).copy_(self._mask_of(name))
        return keep.view(as_matrix(shape) or shape)

    def _grid(self, key: str) -> Grid | None:
        """Of whose values a matrix's kept weights are; a stack's are stored as they are."""
        alone = key in self.names and len(self.checkpoint.spec(key).shape) == 2
        return self._grid_of(self.names[key][0]) if alone else None

    def finish(self, directory: Path, shards: Mapping[str, list[str]]) -> dict[str, Any]:
        """What `trim.json` says of the files of `plan`."""
        places = dict(zip(numbered("packed", len(shards)), shards, strict=True))
        return {"packed": {"shards": places, "tensors": self._records}}
