"""A file system that fails at the n-th write: what Python's own calls do to files, counted, and made to fail."""

import builtins
import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

# What a full disk lets happen: files go, and names move once there was room for one.
RELEASING = {"unlink", "rmdir"}
MOVING = {"rename", "replace"}


@dataclass
class Faults:
    """Counts writes below `root`, and fails the one numbered `at`, from 1 on, with the error `number`; 0: none."""

    root: Path
    at: int = 0
    number: int = errno.ENOSPC
    calls: list[str] = field(default_factory=list)

    def write(self, call: str, path: Any) -> None:
        """One call that writes. Raises OSError where it is to fail."""
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else self._opened(path)
        if not os.path.abspath(name).startswith(str(self.root)):
            return
        if self.number == errno.ENOSPC and call in RELEASING:
            return
        self.calls.append(call)
        count = len(self.calls)
        # These two last until something is done about them; the others hit one call.
        lasting = self.number == errno.EROFS or (self.number == errno.ENOSPC and call not in MOVING)
        if self.at and (count == self.at or (count > self.at and lasting)):
            raise OSError(self.number, os.strerror(self.number), *([] if call in ("write", "fsync") else [name]))

    @staticmethod
    def _opened(descriptor: int) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            return "/"


class _File(io.FileIO):
    """A file whose every write is counted."""

    faults: Faults

    def write(self, data: Any, /) -> int:
        """Write, unless it is this one that fails."""
        self.faults.write("write", str(self.name))
        return super().write(data)


def _opener(faults: Faults, original: Callable[..., Any]) -> Callable[..., Any]:
    def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **named: Any) -> Any:
        writes = set(mode) & set("wax+")
        if not writes or isinstance(file, int) or named.get("opener"):
            return original(file, mode, buffering, *args, **named)
        if "r" not in mode or not os.path.exists(file):
            faults.write("open", file)
        raw = _File(file, mode.replace("b", "").replace("t", ""))
        raw.faults = faults
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **named)

    return opened


@contextmanager
def failing(faults: Faults) -> Iterator[None]:
    """While this lasts, writes go through `faults`."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def low_level(path: Any, flags: int, *args: Any, _original: Any = os.open, **named: Any) -> int:
        if flags & writing and not (os.path.exists(path) and stat.S_ISCHR(os.stat(path).st_mode)):
            faults.write("open", path)
        return int(_original(path, flags, *args, **named))

    def counted(call: str, original: Any, place: int = 0) -> Callable[..., Any]:
        def called(*args: Any, **named: Any) -> Any:
            faults.write(call, args[place])
            return original(*args, **named)

        return called

    opened = _opener(faults, io.open)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(io, "open", opened))
        stack.enter_context(mock.patch.object(builtins, "open", opened))
        stack.enter_context(mock.patch.object(os, "open", low_level))
        for call, place in (
            ("write", 0), ("fsync", 0), ("rename", 1), ("replace", 1), ("mkdir", 0), ("link", 1), ("sendfile", 0),
            ("unlink", 0), ("rmdir", 0),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(os, call, counted(call, getattr(os, call), place)))
        yield
