"""The shards of a model directory: where its tensors come from, one at a time."""

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from trimcli.errors import InputError, first_line
from trimcli.files.tensors import TensorSpec, natural, open_tensors, spec_of


def shard_names(names: Iterable[Any], record: Path) -> list[str]:
    """The names of shards in the file `record`. Raises InputError unless each is a file's beside it."""
    found = list(names)
    for name in found:
        # Windows takes either separator, and drives; a directory is to be as good everywhere.
        if not isinstance(name, str) or name in ("", "..") or PureWindowsPath(name).name != name:
            what = f"{record} names the shard {name!r} outside the model directory; fetch or make the model anew."
            raise InputError(what)
    return found


def refuse_outside(path: Path, directory: Path) -> None:
    """Raise InputError for a file of a model directory that is a link out of it: who made the directory chose to where.

    Not for one into the hub's cache, where files lie in `models--*/blobs`.
    """
    place = path.resolve()
    cached = place.parent.name == "blobs" and place.parent.parent.name.startswith("models--")
    if not cached and not place.is_relative_to(directory.resolve()):
        raise InputError(f"{path} is a link out of the model directory, to {place}; put the file itself there.")


class Shards(ABC):
    """Tensors in the shards of one directory. files: shard file name -> the names of the tensors in it."""

    files: dict[str, list[str]]

    def keys(self) -> list[str]:
        """Names of all tensors, in natural order."""
        return sorted({key for keys in self.files.values() for key in keys}, key=natural)

    @abstractmethod
    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of a tensor, without reading it."""

    @abstractmethod
    def load(self, key: str) -> Tensor:
        """A tensor in its stored dtype, mapped where the storage allows."""


class SafeShards(Shards):
    """Tensors in safetensors shards. Raises InputError for a shard that is missing, truncated or damaged."""

    def __init__(self, directory: Path, names: Iterable[str]) -> None:
        self._paths = {name: directory / name for name in names}
        for path in self._paths.values():
            refuse_outside(path, directory)
        self._handles = {name: open_tensors(path) for name, path in self._paths.items()}
        self.files = {name: list(handle.keys()) for name, handle in self._handles.items()}
        self.home = {key: name for name, keys in self.files.items() for key in keys}

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape, from the header alone. Raises InputError for a dtype that torch has not."""
        home = self.home[key]
        return spec_of(self._handles[home], key, self._paths[home])

    def load(self, key: str) -> Tensor:
        """The tensor, mapped."""
        return self._handles[self.home[key]].get_tensor(key)


def _plain_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, mapped. Raises ValueError for what claims more than the file holds."""
    mapped = zipfile.is_zipfile(path)
    if mapped:  # files from before PyTorch 1.6 are no zip archives and cannot be mapped
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its parts are compressed")
    found = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    if not isinstance(found, Mapping):
        raise ValueError(f"it holds a {type(found).__name__}, not tensors by name")
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.nbytes > path.stat().st_size:
            raise ValueError(f"{key} is no plain tensor, or claims more than the file holds")
    return tensors


class BinShards(Shards):
    """Tensors in `pytorch_model*.bin`, unpickled by the restricted reader and mapped."""

    def __init__(self, directory: Path, names: Iterable[str]) -> None:
        self._tensors: dict[str, Tensor] = {}
        self.files = {}
        for name in names:
            path = directory / name
            refuse_outside(path, directory)
            try:
                tensors = _plain_tensors(path)
            except Exception as problem:  # torch raises anything from RuntimeError to UnpicklingError here
                what = f"{path} cannot be read as a plain weights file ({first_line(problem)})"
                raise InputError(f"{what}; give a safetensors one.") from None
            self._tensors.update(tensors)
            self.files[name] = list(tensors)

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape."""
        return TensorSpec.of(self._tensors[key])

    def load(self, key: str) -> Tensor:
        """The tensor, mapped."""
        return self._tensors[key]
