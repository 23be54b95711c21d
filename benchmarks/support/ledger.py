"""Finished runs as JSON lines, so that a long study can be stopped, continued and split over processes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock


class Ledger:
    """A file of finished runs: one line a run, found again by its key.

    path: the file; made on the first `add`. Several processes may add at the same time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))

    def __iter__(self) -> Any:
        for line in self.path.read_text().splitlines() if self.path.is_file() else []:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # the run that wrote it was killed in the middle
                continue

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The facts of the run `key` (a JSON object), None where it has not been run. The last one counts."""
        wanted = _canonical(key)
        found = [entry["facts"] for entry in self if _canonical(entry["key"]) == wanted]
        return found[-1] if found else None

    def add(self, key: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Note the facts of the run `key`."""
        with self._lock, self.path.open("a+b") as handle:
            handle.seek(0, 2)
            if handle.tell():
                handle.seek(-1, 2)
                torn = handle.read(1) != b"\n"
                handle.write(b"\n" if torn else b"")
            handle.write(json.dumps({"key": key, "facts": facts}).encode() + b"\n")


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
