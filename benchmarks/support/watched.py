"""A command line of trim run in this process, and what of it is not as promised."""

import os
import re
import resource
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import typer
from typer.testing import CliRunner

from trimcli.cli.app import app
from trimcli.console import OBEYED

STATUSES = {0, 1, 2, 130}
PIECE = re.compile(r"\..+\.\d+\.(part|old)")
# What says that memory, not a check, was the limit.
EXHAUSTED = re.compile("memory ran out|allocate memory|MemoryError|bad_alloc", re.IGNORECASE)


class TooLong(BaseException):
    """The run takes longer than it was given."""


@dataclass(frozen=True)
class Found:
    """How a run ended, and what is wrong with that: nothing, if all is as promised."""

    status: int
    said: str
    wrong: str | None


@contextmanager
def memory_limit(nbytes: int) -> Iterator[None]:
    """No more than so many bytes of address space beyond what is in use."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(line: Sequence[str], out: Path, *, seconds: int = 60, stdin: bytes | None = None) -> Found:
    """Run `trim` with these arguments. out: the empty folder of its outputs. seconds: of the processor."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TooLong

    # Time that passes while the machine does something else is not the run's; one that waits for ever takes none.
    before = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    argv, sys.argv = sys.argv, ["trim", *line]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(20 * seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = CliRunner().invoke(app, list(line), input=stdin)
    except TooLong:
        return Found(-1, "", f"took longer than {seconds} s")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.argv = argv
    return Found(result.exit_code, result.stderr, next(_wrong(result.exit_code, result, out), None))


def _wrong(status: int, result: object, out: Path) -> Iterator[str]:
    said, told = getattr(result, "stderr", ""), getattr(result, "stdout", "")
    problem = getattr(result, "exception", None)
    if problem is not None and not isinstance(problem, SystemExit | typer.Exit):
        yield f"{type(problem).__name__} went through: {problem}"
    if status not in STATUSES:
        yield f"exit status {status}"
    if "Traceback (most recent call last)" in said or "internal error" in said:
        yield said.strip().splitlines()[-1][:500]
    if EXHAUSTED.search(said):
        yield f"memory was the limit: {said.strip()[-300:]}"
    if status and not any(line.startswith(("trim: ", "Usage:")) for line in said.splitlines()):
        yield f"exit status {status} without a sentence: {said[-300:]!r}"
    obeyed = [found[0] for found in OBEYED.finditer(said + told) if found[0] not in "\n\t"]
    if obeyed:
        yield f"a terminal obeys {obeyed[0]!r} of what it printed"
    left = sorted(path.name for path in out.iterdir())
    if status and left:
        yield f"left {left} behind"
    if any(PIECE.fullmatch(name) for name in left):
        yield f"left {left} behind"
