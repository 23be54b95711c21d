"""The masks of a pruned directory, as its `trim.json` tells of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trimcli.errors import InputError, MismatchError
from trimcli.files.atomic import MARK
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.directory import matrix_in
from trimcli.files.documents import read_mark, refuse_later
from trimcli.files.forms import MODEL, PRUNED_LINEAR, Each, Must, check_form
from trimcli.files.manifest import PACKED, PRUNED, is_intact
from trimcli.files.masks import keep_digest
from trimcli.methods import masks

FORM = {"linears": Must(Each(Must(PRUNED_LINEAR))), "model": MODEL}


class Masks(Protocol):
    """Masks by linear, whatever holds them: a masks file or a pruned directory."""

    @property
    def path(self) -> Path:
        """What holds them."""

    @property
    def manifest(self) -> dict[str, Any]:
        """What it says of itself."""

    @property
    def names(self) -> list[str]:
        """The linears that have a mask, by full module name."""

    def entry(self, name: str) -> dict[str, Any]:
        """What is recorded of a linear: `zeros` of its mask, `target`, `pattern`."""

    def shape(self, name: str) -> tuple[int, int]:
        """(D_out, D_in) of a linear."""

    def keep(self, name: str) -> Tensor:
        """A linear's mask: bool [D_out, D_in], True = stays."""


class DirectoryMasks:
    """The masks of a pruned or packed directory.

    manifest: its `trim.json`. Raises InputError for a directory without one, and MismatchError for another schema.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.directory
        self.manifest = read_mark(checkpoint.directory)
        self._checkpoint = checkpoint
        mark = self.path / MARK
        if not self.manifest:
            what = f"{self.path} has no {MARK}, so nothing says which of its weights were pruned"
            raise InputError(f"{what}; give a directory that trim pruned, or its masks file with --masks.")
        refuse_later(self.manifest, (PRUNED, PACKED), mark)
        if self.manifest.get("schema") not in (PRUNED, PACKED):
            raise MismatchError(f"{mark} is of schema {self.manifest.get('schema')!r}; give a pruned directory.")
        if not is_intact(self.manifest):
            raise InputError(f"{mark} was changed after trim wrote it; prune the model anew, or give --masks.")
        check_form(self.manifest, FORM, mark, "manifest")

    @property
    def names(self) -> list[str]:
        """The linears that have a mask, by full module name, in the model's order."""
        return list(self.manifest["linears"])

    def entry(self, name: str) -> dict[str, Any]:
        """What the manifest says of a linear, `zeros` those of its mask."""
        entry = dict(self.manifest["linears"][name])
        return {**entry, "zeros": entry.get("pruned", entry["zeros"])}

    def shape(self, name: str) -> tuple[int, int]:
        """(D_out, D_in) of a linear."""
        d_out, d_in = self.manifest["linears"][name]["shape"]
        return d_out, d_in

    def keep(self, name: str) -> Tensor:
        """A linear's mask: bool [D_out, D_in]. Raises InputError where weights and manifest do not tell it."""
        entry = self.manifest["linears"][name]
        if entry["key"] not in self._checkpoint.keys():  # noqa: SIM118 - no mapping
            raise InputError(f"{self.path} lacks the tensor {entry['key']}; fetch or prune the model anew.")
        found = mask_in(self._checkpoint, entry)
        if found is None:
            what = f"{self.path / MARK} does not tell the weights of {name} that were pruned from others at zero"
            raise InputError(f"{what}; give the masks file with --masks.")
        return found


def mask_in(checkpoint: Checkpoint, entry: Mapping[str, Any]) -> Tensor | None:
    """The mask of a directory's matrix, bool [D_out, D_in]; None where neither it nor its `trim.json` tells.

    entry: of `trim.json`. Told by a packed directory's keep bits; else it is where the weights are not zero, as the
    recorded digest and counts have it, and where kept ones that are zero are listed.
    """
    packed = checkpoint.keep_bits(entry["key"])
    stored = checkpoint.load(entry["key"]) != 0 if packed is None else packed
    keep = matrix_in(stored, entry).contiguous()
    if packed is not None:
        return keep
    zeros = keep.numel() - int(keep.count_nonzero())
    if zeros != entry["zeros"] or keep_digest(masks.pack(keep)) != entry["keep_sha256"]:
        return None
    places = entry.get("kept_zeros") or []
    if zeros - entry.get("pruned", zeros) != len(places) or any(place >= keep.numel() for place in places):
        return None
    keep.view(-1)[torch.tensor(places, dtype=torch.int64)] = True
    return keep
