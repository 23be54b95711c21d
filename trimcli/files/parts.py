"""Part files: what the finished layers of an unfinished run left, so that a restart replays them.

Each has a digest of its tensors and facts, so that one that was damaged since is made anew and never replayed.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trimcli.errors import InputError, TrimError
from trimcli.files.atomic import atomic_file
from trimcli.files.documents import finite_or_none
from trimcli.files.tensors import TensorSpec, open_tensors, spec_of, tensor_hash, write_tensors
from trimcli.world import current


class Parts:
    """One safetensors file a layer, durable. One run at a time holds the folder; a second one is told so.

    Where several ranks share a run, the first one holds, writes and discards; the others read what lies there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock: Any = None
        self._whole: set[int] = set()

    def __enter__(self) -> "Parts":
        from filelock import FileLock, Timeout

        if not current().is_first:
            return self
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.directory.with_suffix(".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            what = f"another run of the same command holds {self.directory}"
            raise TrimError(f"{what}; wait for it or give another --cache-dir.") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is None:
            return
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()
        self._lock.release()
        if not self.directory.exists():
            self.directory.with_suffix(".lock").unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self.directory / f"layer-{index:05d}.safetensors"

    def finished(self) -> int:
        """How many layers from the first on are finished, their files being whole."""
        return current().agreed(self._count)

    def _count(self) -> int:
        count = 0
        while self._is_whole(count):
            count += 1
        return count

    def _is_whole(self, index: int) -> bool:
        if index not in self._whole and self._path(index).is_file():
            try:
                if self.read(index).is_intact():
                    self._whole.add(index)
            except InputError:  # damaged: the layer's turn comes again
                return False
        return index in self._whole

    def discard(self) -> None:
        """Forget everything: under --no-resume before the run, and after a run that came to its end."""
        self._whole.clear()
        if not current().is_first:
            return
        for path in self.directory.glob("*"):
            path.unlink()

    def write(self, index: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Leave layer `index`'s tensors and JSON facts."""
        if not current().is_first:
            return
        specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        text = json.dumps(finite_or_none(facts))
        metadata = {"facts": text, "digest": _digest(text, sorted(specs), specs.__getitem__, tensors.__getitem__)}
        with atomic_file(self._path(index), force=True) as temporary:
            write_tensors(temporary, specs, tensors.__getitem__, metadata)
        self._whole.add(index)

    def read(self, index: int) -> "Part":
        """Layer `index`'s part."""
        return Part(self._path(index))


def _digest(
    facts: str, names: Iterable[str], spec: Callable[[str], TensorSpec], tensor: Callable[[str], Tensor]
) -> str:
    """SHA-256 of a part's facts and of its tensors' names, dtypes, shapes and XXH3-128."""
    found = hashlib.sha256(facts.encode())
    for name in names:
        found.update(f"{name} {spec(name)} {tensor_hash(tensor(name))} ".encode())
    return found.hexdigest()


class Part:
    """One layer's part file, read lazily. Raises InputError for one that is damaged or no part."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = open_tensors(path)
        self._metadata: dict[str, str] = self._handle.metadata() or {}
        try:
            self.facts: dict[str, Any] = json.loads(self._metadata["facts"])
        except (KeyError, ValueError, RecursionError):
            raise InputError(f"{path} is not a part file of trim; clear the cache with `trim cache --clear`.") from None
        self.names: list[str] = list(self._handle.keys())

    def is_intact(self) -> bool:
        """Whether everything in it is what was written. Raises InputError for a dtype that torch lacks."""
        found = _digest(self._metadata["facts"], sorted(self.names), self.spec, self.load)
        return found == self._metadata.get("digest")

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return spec_of(self._handle, name, self._path)

    def load(self, name: str) -> Tensor:
        """A tensor, mapped."""
        return self._handle.get_tensor(name)

    def weight(self, linear: str) -> Tensor | None:
        """A linear's new weight [D_out, D_in], None where the dense values stay."""
        return self.load(key) if (key := f"{linear}.weight") in self.names else None
