"""Writing packed checkpoints (`trim.packed/1`), whose form `files.packed` describes."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trimcli.files.checkpoint import Checkpoint
from trimcli.files.directory import PrunedLinear, PrunedTensors, numbered
from trimcli.files.packed import kept_values, packed_specs, stored_parts
from trimcli.files.tensors import TensorSpec, dtype_name, tensor_digest
from trimcli.methods import masks


class PackedTensors(PrunedTensors):
    """One shard for each of the dense model. keep_of(name): a mask outside which `weight_of` is zero."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weight_of: Callable[[str], Tensor | None],
        linears: Mapping[str, PrunedLinear],
        keep_of: Callable[[str], Tensor],
    ) -> None:
        super().__init__(checkpoint, weight_of, linears, keep_of)
        self._mask_of = keep_of
        self._records: dict[str, dict[str, Any]] = {}
        self._homes: dict[str, str] = {}

    def plan(self, shards: Mapping[str, list[str]]) -> dict[str, dict[str, TensorSpec]]:
        """File name -> the tensors that it is to hold: whole ones, keep bits and kept values."""
        files = zip(numbered("packed", len(shards)), shards.values(), strict=True)
        return {file: dict(part for key in keys for part in self._parts(file, key)) for file, keys in files}

    def _parts(self, file: str, key: str) -> Iterable[tuple[str, TensorSpec]]:
        spec = self.checkpoint.spec(key)
        specs, kept = [spec], None
        if key in self.names:
            left = math.prod(spec.shape) - self.linears[self.names[key]].pruned
            packed = packed_specs(spec, left)
            if sum(part.nbytes for part in packed) < spec.nbytes:
                specs, kept = packed, left
        shape, dtype = list(spec.shape), dtype_name(spec.dtype)
        self._records[key] = {"shard": file, "dtype": dtype, "shape": shape, "kept": kept}
        parts = stored_parts(key, self._records[key])
        self._homes.update(dict.fromkeys(parts, key))
        return zip(parts, specs, strict=True)

    def stored(self, name: str) -> Tensor:
        """A tensor of `plan`."""
        key = self._homes[name]
        if name == f"{key}.keep":
            return masks.pack(self._keep(key))
        value = self.pruned(key)
        self._records[key]["sha256"] = tensor_digest(value)
        return value if name == key else kept_values(value, self._keep(key))

    def _keep(self, key: str) -> Tensor:
        """The mask as the matrix is stored."""
        name = self.names[key]
        keep = self._mask_of(name)
        return keep.T.contiguous() if self.linears[name].transposed else keep

    def finish(self, directory: Path, shards: Mapping[str, list[str]]) -> dict[str, Any]:
        """What `trim.json` says of the files of `plan`."""
        places = dict(zip(numbered("packed", len(shards)), shards, strict=True))
        return {"packed": {"shards": places, "tensors": self._records}}
