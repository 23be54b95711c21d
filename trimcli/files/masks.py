"""The masks artifact (`trim.masks/1`): which weights of which linears stay, one bit a weight.

Per linear a tensor `<name>.keep`, uint8 [D_out, ceil(D_in / 8)], most significant bit first, 1 = kept; in the manifest,
under `linears`, in the model's order, `{shape, zeros, sparsity, keep_sha256}` beside what the caller says of it, such
as how many `tokens` reached an expert. Where kept weights were rounded to a few bits, `wbits` and `group_size` as well,
and as tensors their grid, `<name>.scales`, bfloat16 [D_out, ceil(D_in / group_size)], and `<name>.zeros`, uint8 of that
shape.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimcli.errors import InputError
from trimcli.files.forms import MASKED_LINEAR, PRUNING, Each, Must, check_form
from trimcli.files.integers import grid_specs
from trimcli.files.manifest import MASKS, is_intact, with_linears
from trimcli.files.tensors import TensorSpec, open_tensors, read_manifest, spec_of, tensor_digest, write_artifact
from trimcli.methods import masks
from trimcli.methods.updates.grid import Grid

FORM = {**PRUNING, "linears": Must(Each(Must(MASKED_LINEAR)))}


def keep_digest(packed: Tensor) -> str:
    """SHA-256 of packed keep bits (`masks.pack` of bool [D_out, D_in]), hexadecimal."""
    return tensor_digest(packed)


def keep_spec(shape: tuple[int, int]) -> TensorSpec:
    """The packed keep bits of a matrix of this shape."""
    return TensorSpec(torch.uint8, (shape[0], -(-shape[1] // 8)))


@dataclass(frozen=True, eq=False)
class MaskFile:
    """A masks file opened for reading, one mask at a time."""

    path: Path
    manifest: dict[str, Any]
    _handle: Any

    @classmethod
    def open(cls, path: Path) -> "MaskFile":
        """Open a file. Raises InputError (missing, damaged, manifest edited), MismatchError (not a masks file)."""
        manifest = read_manifest(path, MASKS)
        if not is_intact(manifest):
            raise InputError(f"the manifest in {path} was changed after trim wrote it; make the masks anew.")
        check_form(manifest, FORM, path, "masks")
        handle = open_tensors(path)
        there = set(handle.keys())
        for name, entry in manifest["linears"].items():
            key = f"{name}.keep"
            if key not in there or spec_of(handle, key, path) != keep_spec(entry["shape"]):
                raise InputError(f"{path} lacks the mask of {name} that its manifest lists; make it anew.")
            if entry.get("wbits") is not None:
                for kind, spec in grid_specs(tuple(entry["shape"]), entry.get("group_size") or 1).items():
                    if f"{name}.{kind}" not in there or spec_of(handle, f"{name}.{kind}", path) != spec:
                        raise InputError(f"{path} lacks the {kind} of {name} that its manifest lists; make it anew.")
        return cls(path, manifest, handle)

    @property
    def names(self) -> list[str]:
        """The linears that have a mask, by full module name, in the model's order."""
        return list(self.manifest["linears"])

    def entry(self, name: str) -> dict[str, Any]:
        """What the manifest says of a linear: `shape`, `zeros`, `keep_sha256`, `target`, `pattern`."""
        return dict(self.manifest["linears"][name])

    def shape(self, name: str) -> tuple[int, int]:
        """(D_out, D_in) of a linear."""
        d_out, d_in = self.manifest["linears"][name]["shape"]
        return d_out, d_in

    def grid(self, name: str) -> Grid | None:
        """What a linear's kept weights were rounded to; None where they were not."""
        entry = self.manifest["linears"][name]
        if entry.get("wbits") is None:
            return None
        scales, zeros = (self._handle.get_tensor(f"{name}.{kind}") for kind in ("scales", "zeros"))
        return Grid(entry["wbits"], entry["group_size"], scales, zeros)

    def keep(self, name: str) -> Tensor:
        """A linear's mask: bool [D_out, D_in], True = stays. Raises InputError if its bits were altered."""
        packed = self._handle.get_tensor(f"{name}.keep")
        keep = masks.unpack(packed, self.shape(name)[1])
        said = self.manifest["linears"][name]
        altered = keep_digest(packed) != said["keep_sha256"]
        if altered or keep.numel() - int(keep.count_nonzero()) != said["zeros"]:
            raise InputError(f"the mask of {name} in {self.path} was altered; make the masks anew.")
        return keep


def write_masks(
    path: Path,
    document: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    keep_of: Callable[[str], Tensor],
    grid_of: Callable[[str], Grid | None] = lambda _: None,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Write a masks file, one mask in memory; returns the manifest as written. Raises OutputExists.

    document: its manifest, whose `linears` may hold what is known of a linear. keep_of(name): bool [D_out, D_in];
    called twice, since the manifest comes first. grid_of(name): the grid of its kept weights, if any.
    """
    linears = {}
    for name, shape in shapes.items():
        keep = keep_of(name)
        zeros = keep.numel() - int(keep.count_nonzero())
        found = {"shape": list(shape), "zeros": zeros, "sparsity": zeros / keep.numel()}
        known = document.get("linears", {}).get(name, {})
        linears[name] = {**known, **found, "keep_sha256": keep_digest(masks.pack(keep))}
        if grid := grid_of(name):
            linears[name] |= {"wbits": grid.wbits, "group_size": grid.group_size}
    complete = with_linears(document, linears)
    specs: dict[str, TensorSpec] = {}
    for name, shape in shapes.items():
        specs[f"{name}.keep"] = keep_spec(shape)
        if "wbits" in linears[name]:
            specs |= {f"{name}.{kind}": spec for kind, spec in grid_specs(shape, linears[name]["group_size"]).items()}

    def packed(key: str) -> Tensor:
        name, _, kind = key.rpartition(".")
        if kind == "keep":
            return masks.pack(keep_of(name))
        grid = grid_of(name)
        assert grid is not None
        return grid.scales if kind == "scales" else grid.zeros

    write_artifact(path, complete, specs, packed, force=force)
    return complete
