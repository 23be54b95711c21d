"""Commands of trim in processes of their own, forked from this one so that nothing is imported anew."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import trimcli
from trimcli.cli.app import main

PACKAGE = Path(trimcli.__file__).parent


@dataclass(frozen=True)
class Child:
    """A command that runs. said: the file of what it prints."""

    pid: int
    said: Path

    def wait(self, seconds: float) -> int:
        """Its exit status, negative for a signal; killed, and -9, after so many seconds."""
        until = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                until += 1e9
            time.sleep(0.002)

    def end(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def sentence(self) -> str:
        """The last line that it printed."""
        return (self.said.read_text(errors="replace").strip().splitlines() or [""])[-1]


def start(
    line: Sequence[str],
    folder: Path,
    said: Path,
    *,
    within: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Child:
    """Run `trim` with these arguments in `folder`. within: what surrounds the run, in its process."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, said)
    status, over = 70, False
    try:
        os.chdir(folder)
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["trim", *line]
        with within():
            try:
                main()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            over = True
            sys.stdout.flush()
            sys.stderr.flush()
    except BaseException as problem:
        outside = not any(str(PACKAGE) in frame.filename for frame in traceback.extract_tb(problem.__traceback__))
        if isinstance(problem, KeyboardInterrupt) and outside:  # as while Python starts
            status = 130
            os.write(2, b"interrupted before the command began\n")
        elif not over:
            os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)
