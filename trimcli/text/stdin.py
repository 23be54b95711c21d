"""Standard input as a file, where a command takes `-` for a text or for tokens."""

import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trimcli.errors import OptionError
from trimcli.world import ranks

STDIN = "-"
STDIN_NAME = "standard input"

# What was read, by the stream that it was read from: a stream can be read once, and its text is asked for more often.
_SPOOLED: weakref.WeakKeyDictionary[Any, Path] = weakref.WeakKeyDictionary()


def check_stdin(values: Iterable[object]) -> None:
    """Raise OptionError where more than one of an invocation's values is `-`, or one is and a person would type it."""
    named = sum(str(value) == STDIN for value in values)
    if named > 1:
        raise OptionError("- is named twice, and standard input can be read once; give a file for one of the two.")
    if named and ranks() > 1:
        raise OptionError(f"- reads standard input, which {ranks()} ranks cannot share; give a file.")
    if named and (sys.stdin is None or sys.stdin.isatty()):
        raise OptionError("- reads standard input, which is a terminal; pipe something into it or give a file.")


def file_of(value: str | Path) -> Path:
    """The file that an option names. Of `-`, a temporary copy of standard input that lasts as long as the stream."""
    if str(value) != STDIN:
        return Path(value)
    check_stdin([value])
    if sys.stdin not in _SPOOLED:
        folder = tempfile.mkdtemp(prefix="trim-stdin-")
        weakref.finalize(sys.stdin, shutil.rmtree, folder, ignore_errors=True)
        with (path := Path(folder, STDIN_NAME)).open("wb") as spool:
            shutil.copyfileobj(sys.stdin.buffer, spool)
        _SPOOLED[sys.stdin] = path
    return _SPOOLED[sys.stdin]
