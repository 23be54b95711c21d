"""Outputs that appear whole: written beside their target and renamed once synced, together in `all_or_none`."""

import contextlib
import contextvars
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from trimcli.errors import InputError, OptionError, OutputExists

MARK = "trim.json"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise OutputExists unless `target` is free, or a file or made by trim under `force`; InputError, no parent."""
    if not target.parent.is_dir():
        raise InputError(f"the directory {target.parent} for the output {target.name} does not exist; create it.")
    taken = any(target.iterdir()) if target.is_dir() else target.exists()
    if taken and target.is_dir() and not (target / MARK).is_file():
        raise OutputExists(f"{target} is a directory that trim did not make; name another output.")
    if taken and not force:
        raise OutputExists(f"{target} exists already; give --force to replace it or name another output.")


class _Output:
    """An output that is staged beside its target: `.NAME.PID.part`, and `.NAME.PID.old` while it replaces another."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.staged, self.old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("part", "old"))
        self._replaces: bool | None = None

    def stand(self, *, alone: bool) -> None:
        """Rename what is staged in place, keeping what stood there as `old`."""
        if alone and not self.staged.is_dir():
            self.staged.replace(self.target)  # in one step, so that there is a whole file at every moment
            return
        _remove(self.old)
        self._replaces = os.path.lexists(self.target)
        if self._replaces:
            self.target.rename(self.old)
        self.staged.rename(self.target)

    def withdraw(self) -> None:
        """Remove what is staged and undo `stand`, however far it came."""
        if self._replaces and os.path.lexists(self.old):
            _remove(self.target)
            self.old.rename(self.target)
        elif self._replaces is False and not os.path.lexists(self.staged):
            _remove(self.target)
        _remove(self.staged)


# The staged outputs of the innermost `all_or_none`; None outside of one, and while an output is being written, since
# what is written then is a part of it.
_TOGETHER: contextvars.ContextVar[list[_Output] | None] = contextvars.ContextVar("together", default=None)


@contextlib.contextmanager
def all_or_none() -> Iterator[list[_Output]]:
    """Within this, outputs of `atomic_file` and `atomic_directory` stay staged, and take their places when it ends.

    On any error, be it the last rename's, what they replace stands again. Raises OptionError for one inside another.
    """
    if (around := _TOGETHER.get()) is not None:
        yield around
        return
    outputs: list[_Output] = []
    token = _TOGETHER.set(outputs)
    try:
        yield outputs
        for output in outputs:
            output.stand(alone=len(outputs) == 1)
        for directory in {output.target.parent for output in outputs}:
            _sync(directory)
    except BaseException:
        with contextlib.ExitStack() as stack:  # the last first, and each whatever becomes of the others
            for output in outputs:
                stack.callback(output.withdraw)
        raise
    finally:
        _TOGETHER.reset(token)
    for output in outputs:
        _remove(output.old)


@contextlib.contextmanager
def atomic_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success sync and rename it, on any error remove it."""
    refuse_existing(target, force=force)
    if target.is_dir():
        raise OutputExists(f"{target} is a directory where a file is to be written; name another output.")
    with _staged(target) as temporary:
        yield temporary


@contextlib.contextmanager
def atomic_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `target`; on success sync and rename it, on any error remove it."""
    refuse_existing(target, force=force)
    if target.is_file():
        raise OutputExists(f"{target} is a file where a directory is to be written; name another output.")
    with _staged(target) as temporary:
        temporary.mkdir()
        yield temporary


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    with all_or_none() as together:
        output, place = _Output(target), target.resolve()
        for other in together:
            there = other.target.resolve()
            if place.is_relative_to(there) or there.is_relative_to(place):
                both = f"{other.target} and {target}"
                raise OptionError(f"of the outputs {both} one would replace the other; name another place.")
        token = _TOGETHER.set(None)
        try:
            _remove(output.staged)
            yield output.staged
            for path in [*output.staged.rglob("*"), output.staged]:
                _sync(path)
        except BaseException:
            output.withdraw()
            raise
        finally:
            _TOGETHER.reset(token)
        together.append(output)


def _sync(path: Path) -> None:
    if not path.is_dir():
        with path.open("rb+") as handle:  # Windows syncs only what may be written
            os.fsync(handle.fileno())
        return
    with contextlib.suppress(PermissionError):  # Windows opens no directory
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
