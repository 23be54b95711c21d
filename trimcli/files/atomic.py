"""Outputs that appear whole: written beside their target and renamed in place once complete and synced.

A file that exists is whole.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from trimcli.errors import InputError, OutputExists

MARK = "trim.json"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise OutputExists unless `target` is free, or may be replaced.

    A file is replaced under `force`; a directory under `force` only if it is empty or carries `trim.json`.
    Raises InputError when the parent directory is missing.
    """
    if not target.parent.is_dir():
        raise InputError(f"the directory {target.parent} for the output {target.name} does not exist; create it.")
    if not target.exists():
        return
    if target.is_dir():
        if not any(target.iterdir()):
            return
        if not (target / MARK).is_file():
            raise OutputExists(f"{target} is a directory that trim did not make; name another output.")
    if not force:
        raise OutputExists(f"{target} exists already; give --force to replace it or name another output.")


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success sync and rename it, on any error remove it."""
    refuse_existing(target, force=force)
    if target.is_dir():
        raise OutputExists(f"{target} is a directory where a file is to be written; name another output.")
    temporary = _temporary(target)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `target`; on success rename it in place, on any error remove it."""
    refuse_existing(target, force=force)
    if target.is_file():
        raise OutputExists(f"{target} is a file where a directory is to be written; name another output.")
    temporary = _temporary(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
        old = None
        if target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
        temporary.rename(target)
        _sync(target.parent)
        if old:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
