"""The stage cache: artifacts of earlier runs under names made from what they depend on, and unfinished runs' parts."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimcli.artifacts import TensorSpec, atomic_file, finite_or_none, open_tensors, write_tensors
from trimcli.checkpoint import canonical_json
from trimcli.errors import InputError, TrimError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """One thing the cache holds: its kind (calibration, ratios, parts), path, bytes and manifest summary."""

    kind: str
    path: Path
    nbytes: int


class Cache:
    """A folder of stage files.

    directory: None for the user's cache folder, as platformdirs names it.
    """

    def __init__(self, directory: Path | None = None) -> None:
        import platformdirs

        self.directory = directory or Path(platformdirs.user_cache_dir("trim"))

    def file(self, kind: str, key: Any, suffix: str) -> Path:
        """Where the artifact of `kind` that depends on `key` (a JSON value) lies or will lie."""
        folder = self.directory / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{digest(key)}{suffix}"

    def parts(self, key: Any) -> "Parts":
        """The part files of the unfinished run that depends on `key`."""
        return Parts(self.directory / "parts" / digest(key))

    def entries(self) -> list[Entry]:
        """Everything the cache holds."""
        found = []
        for kind in sorted(self.directory.glob("*")) if self.directory.is_dir() else []:
            for path in sorted(kind.glob("*")) if kind.is_dir() else []:
                inside = [path] if path.is_file() else [child for child in path.rglob("*") if child.is_file()]
                if path.suffix != ".lock":
                    found.append(Entry(kind.name, path, sum(child.stat().st_size for child in inside)))
        return found

    def clear(self) -> int:
        """Remove everything the cache holds but the parts of runs at work; returns the bytes freed."""
        freed = 0
        for entry in self.entries():
            if entry.path.is_dir():
                try:
                    with Parts(entry.path) as parts:
                        parts.discard()
                except TrimError:
                    continue
            else:
                entry.path.unlink()
            freed += entry.nbytes
        return freed


def digest(key: Any) -> str:
    """Twenty hexadecimal digits for a JSON value under this version: another one may compute something else."""
    text = canonical_json([version("trimcli"), finite_or_none(key)])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class Parts:
    """What the finished layers of a run left: one safetensors file a layer, durable, so that a restart replays them.

    One run at a time holds the folder; a second one with the same key is told so.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock: Any = None

    def __enter__(self) -> "Parts":
        from filelock import FileLock, Timeout

        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.directory.with_suffix(".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise TrimError(
                f"another run of the same command holds {self.directory}; wait for it or give another --cache-dir."
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()
        self._lock.release()
        if not self.directory.exists():
            self.directory.with_suffix(".lock").unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self.directory / f"layer-{index:05d}.safetensors"

    def finished(self) -> int:
        """How many layers from the first on are finished."""
        count = 0
        while self._path(count).is_file():
            count += 1
        return count

    def discard(self) -> None:
        """Forget everything: under --no-resume before the run, and after a run that came to its end."""
        for path in self.directory.glob("*"):
            path.unlink()

    def write(self, index: int, tensors: Mapping[str, "Tensor"], facts: Mapping[str, Any]) -> None:
        """Leave layer `index`'s tensors and JSON facts."""
        specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with atomic_file(self._path(index), force=True) as temporary:
            write_tensors(temporary, specs, tensors.__getitem__, {"facts": json.dumps(finite_or_none(facts))})

    def read(self, index: int) -> "Part":
        """Layer `index`'s part."""
        return Part(self._path(index))


class Part:
    """One layer's part file, read lazily."""

    def __init__(self, path: Path) -> None:
        self._handle = open_tensors(path)
        try:
            self.facts: dict[str, Any] = json.loads((self._handle.metadata() or {})["facts"])
        except (KeyError, json.JSONDecodeError):
            raise InputError(f"{path} is not a part file of trim; clear the cache with `trim cache --clear`.") from None
        self.names: list[str] = list(self._handle.keys())

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        from trimcli.checkpoint import SAFE_DTYPES

        piece = self._handle.get_slice(name)
        return TensorSpec(SAFE_DTYPES[piece.get_dtype()], tuple(piece.get_shape()))

    def load(self, name: str) -> "Tensor":
        """A tensor, mapped."""
        found: Tensor = self._handle.get_tensor(name)
        return found
