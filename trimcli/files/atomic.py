"""Outputs that appear whole: written beside their target and renamed once synced, together in `all_or_none`.

What a killed run leaves there, the next one that looks at the target mends: see `recover`.
"""

import contextlib
import contextvars
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from trimcli.errors import InputError, OptionError, OutputExists, TrimError

try:
    import fcntl
except ImportError:  # Windows, where nothing that is open can be renamed: nothing is held there, and nothing swept
    fcntl = None  # type: ignore[assignment]

MARK = "trim.json"
# What a link is answered where there is nothing, or none is possible.
NO_LINKS = {errno.ENOENT, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EINVAL}
# What is neither a file nor a directory, by how `stat` tells it.
SPECIAL = {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def place_of(target: Path) -> Path:
    """Where an output is written: `target`, or what it is a link to. Raises InputError for a link to itself."""
    place = Path(os.path.realpath(target)) if target.is_symlink() else target
    if place.is_symlink():
        raise InputError(f"{target} is a link that leads back to itself; name another output.")
    return place


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise OutputExists unless `target` is free, or a file or made by trim under `force`; InputError, no parent.

    A link stands for what it leads to. OptionError for a device, a pipe, a socket or a mount point.
    """
    place = place_of(target)
    if not place.parent.is_dir():
        raise InputError(f"the directory {place.parent} for the output {target.name} does not exist; create it.")
    recover(place)
    kind = SPECIAL.get(stat.S_IFMT(place.stat().st_mode)) if place.exists() else None
    if kind is not None:
        raise OptionError(f"{target} is {kind}, which no output replaces; name a file.")
    if place.is_dir() and os.path.ismount(place):
        raise OptionError(f"{target} is a mount point, which nothing can replace; name a directory inside it.")
    taken = any(place.iterdir()) if place.is_dir() else place.exists()
    if taken and place.is_dir() and not (place / MARK).is_file():
        raise OutputExists(f"{target} is a directory that trim did not make; name another output.")
    if taken and not force:
        raise OutputExists(f"{target} exists already; give --force to replace it or name another output.")


def refuse_kind(target: Path, *, directory: bool) -> None:
    """Raise OutputExists for a file in the place of a `directory`, or the other way round."""
    place = place_of(target)
    if directory and place.is_file():
        raise OutputExists(f"{target} is a file where a directory is to be written; name another output.")
    if not directory and place.is_dir():
        raise OutputExists(f"{target} is a directory where a file is to be written; name another output.")


def recover(target: Path, *, sweep: bool = True) -> None:
    """Mend what runs left that were killed while they wrote `target`: what it was is put back if it is missing.

    sweep: what they had written of the new one is removed. Nothing of a run that is still at work is touched.
    """
    with contextlib.suppress(OSError, InputError, ValueError):  # whoever uses `target` will be told
        place = place_of(target)
        if not sweep and os.path.lexists(place):
            return
        own = re.compile(rf"\.{re.escape(place.name)}\.(\d+)\.(part|old)")
        found = [(path, known) for path in place.parent.iterdir() if (known := own.fullmatch(path.name))]
        left = [(path, known[2]) for path, known in found if _is_abandoned(path, int(known[1]))]
        for path, end in sorted(left, key=lambda one: one[0].lstat().st_ctime, reverse=True):  # the latest first
            if end == "old" and not os.path.lexists(place):
                path.rename(place)
            elif sweep:
                _remove(path)


def _is_abandoned(path: Path, process: int) -> bool:
    """Whether the process that staged `path` is gone: no such one runs here, and none anywhere holds the lock."""
    own = process == os.getpid()  # in a container this is often the number of the run before, too
    if fcntl is None or (not own and _runs(process)):
        return own
    try:
        os.close(_lock(path))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return own
    return True


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _lock(path: Path) -> int:
    """A descriptor that holds the lock of a file or directory as long as this process lives. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def can_stage(place: Path) -> None:
    """Raise OSError unless an output can be staged beside `place`."""
    _Output(place).probe()


class _Output:
    """An output that is staged beside its target: `.NAME.PID.part`, and `.NAME.PID.old` while it replaces another."""

    def __init__(self, target: Path) -> None:
        self.target = place_of(target)
        self.staged, self.old = (self._beside(end) for end in ("part", "old"))
        self._replaces: bool | None = None
        self._locks: list[int] = []

    def _beside(self, end: str) -> Path:
        return self.target.with_name(f".{self.target.name}.{os.getpid()}.{end}")

    def probe(self) -> None:
        """Raise OSError unless the output can be staged."""
        self.staged.touch(exist_ok=False)
        self.staged.unlink()

    def begin(self, *, directory: bool) -> None:
        """Make what is staged, empty. Raises TrimError where another process has the same name."""
        if os.path.lexists(self.staged):
            raise TrimError(f"another run is writing {self.target} at this moment; wait for it.")
        if directory:
            self.staged.mkdir()
        else:
            self.staged.touch(exist_ok=False)
        self._hold(self.staged)

    def _hold(self, path: Path) -> None:
        """Show other processes that this one is at work on `path`, wherever it is moved."""
        if fcntl is not None:
            with contextlib.suppress(OSError):
                self._locks.append(_lock(path))

    def release(self) -> None:
        """Nothing is held any more."""
        while self._locks:
            os.close(self._locks.pop())

    def stand(self, *, alone: bool) -> None:
        """Rename what is staged in place, keeping what stood there as `old`."""
        _remove(self.old)
        if alone and not self.staged.is_dir():
            self._replaces = self._keep_aside()
            self.staged.replace(self.target)  # in one step, so that there is a whole file at every moment
            return
        self._replaces = os.path.lexists(self.target)
        if self._replaces:
            self._hold(self.target)
            self.target.rename(self.old)
        self.staged.rename(self.target)

    def _keep_aside(self) -> bool | None:
        """Link what stands there as `old`; False where nothing does, None where there are no links to it."""
        try:
            os.link(self.target, self.old)
        except OSError as problem:
            if problem.errno not in NO_LINKS:
                raise
            return False if problem.errno == errno.ENOENT else None
        return True

    def withdraw(self) -> None:
        """Remove what is staged and undo `stand`, however far it came."""
        if self._replaces and os.path.lexists(self.old):
            if self.target.is_dir():
                _remove(self.target)
            self.old.replace(self.target)
            _remove(self.old)  # which is still there where both were one file
        elif self._replaces is False and not os.path.lexists(self.staged):
            _remove(self.target)
        _remove(self.staged)
        self.release()


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
        output.release()


@contextlib.contextmanager
def atomic_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success sync and rename it, on any error remove it."""
    with _staged(target, directory=False, force=force) as temporary:
        yield temporary


@contextlib.contextmanager
def atomic_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `target`; on success sync and rename it, on any error remove it."""
    with _staged(target, directory=True, force=force) as temporary:
        yield temporary


@contextlib.contextmanager
def _staged(target: Path, *, directory: bool, force: bool) -> Iterator[Path]:
    refuse_existing(target, force=force)
    refuse_kind(target, directory=directory)
    with all_or_none() as together:
        output, place = _Output(target), target.resolve()
        for other in together:
            there = other.target.resolve()
            if place.is_relative_to(there) or there.is_relative_to(place):
                both = f"{other.target} and {target}"
                raise OptionError(f"of the outputs {both} one would replace the other; name another place.")
        output.begin(directory=directory)
        token = _TOGETHER.set(None)
        try:
            yield output.staged
            for path in [*output.staged.rglob("*"), output.staged]:
                _sync(path)
        except BaseException as problem:
            if isinstance(problem, OSError) and problem.errno is not None and problem.filename is None:
                problem.filename = str(target)  # a write that fails does not say where
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
