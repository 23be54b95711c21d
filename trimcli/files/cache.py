"""The stage cache: artifacts of earlier runs under names made from what they depend on."""

import contextlib
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimcli.errors import TrimError
from trimcli.files.documents import canonical_json, finite_or_none
from trimcli.files.manifest import installed
from trimcli.files.parts import Parts
from trimcli.world import current

# How an entry is called, see `digest`.
OWN = re.compile(r"[0-9a-f]{20}(\.\w+)?")


@dataclass(frozen=True)
class Entry:
    """One thing the cache holds: its kind (calibration, ratios, parts), path and bytes."""

    kind: str
    path: Path
    nbytes: int


class Cache:
    """A folder of stage files. directory: None for the user's cache folder, as platformdirs names it."""

    def __init__(self, directory: Path | None = None) -> None:
        import platformdirs

        self.directory = directory or Path(platformdirs.user_cache_dir("trim"))

    def file(self, kind: str, key: Any, suffix: str) -> Path:
        """Where the artifact of `kind` that depends on `key` (a JSON value) lies or will lie."""
        folder = self.directory / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{digest(key)}{suffix}"

    def made(self, kind: str, key: Any, suffix: str, make: Callable[[Path], object]) -> Path:
        """The same, made by `make` where it does not lie yet; where another run is at it, that is waited for.

        Every one of several ranks takes part in making it, of which the first one writes.
        """
        from filelock import FileLock

        path, world = self.file(kind, key, suffix), current()
        if not world.agreed(path.is_file):
            with FileLock(path.with_suffix(".lock")) if world.is_first else contextlib.nullcontext():
                if not world.agreed(path.is_file):
                    make(path)
        return path

    def parts(self, key: Any) -> Parts:
        """The part files of the unfinished run that depends on `key`."""
        return Parts(self.directory / "parts" / digest(key))

    def entries(self) -> list[Entry]:
        """Everything the cache holds: nothing that trim did not name, whichever folder it was given."""
        found = []
        for path in sorted(self.directory.glob("*/*")):
            if path.suffix != ".lock" and OWN.fullmatch(path.name) and not path.is_symlink():
                nbytes = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
                found.append(Entry(path.parent.name, path, nbytes))
        return found

    def clear(self) -> int:
        """Remove everything the cache holds but the parts of runs at work; returns the bytes freed."""
        freed = 0
        for entry in self.entries():
            with contextlib.suppress(TrimError):
                if entry.path.is_dir():
                    with Parts(entry.path) as parts:
                        parts.discard()
                else:
                    entry.path.unlink()
                freed += entry.nbytes
        return freed


def digest(key: Any) -> str:
    """Twenty hexadecimal digits for a JSON value under this version: another one may compute something else."""
    text = canonical_json([installed("trimcli"), finite_or_none(key)])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def spill_folder(cache_dir: Path | None) -> Path:
    """Where hidden states go that memory has no room for, and nobody said where."""
    return Cache(cache_dir).directory / "spilled"
