"""The one error boundary: an exception becomes one sentence on stderr and an exit status."""

import contextlib
import contextvars
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

import typer

from trimcli.console import inert
from trimcli.errors import TrimError
from trimcli.world import ranks, speaks

STOPPED = "the run was stopped, perhaps because another of its ranks ended; repeat the command to go on."
INTERRUPTED = "interrupted; repeat the command: calibrate, prune, sweep, finetune --resume go on where they stopped."


def guarded(work: Callable[[], None]) -> None:
    """Do the work in a context of its own, so that the command line it notes is its own, too.

    SIGTERM ends it as Ctrl-C does, with nothing half-written. What was to print of a Ctrl-C, `interrupted` prints.
    """
    with _stopped_by() as stops:
        try:
            contextvars.copy_context().run(work)
        except typer.Exit:
            raise
        except BaseException as problem:
            with contextlib.suppress(ValueError):  # the launcher, when it learns of another rank's end, comes too late
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if stops:  # libraries written in C may have made another error of it
                if ranks() > 1 and stops[0] == signal.SIGTERM:
                    say(STOPPED)
                raise typer.Exit(128 + stops[0]) from None
            if os.environ.get("TRIM_TRACEBACK") == "1" and not isinstance(problem, KeyboardInterrupt):
                raise
            status, sentence = explain(problem)
            if sentence is None:
                raise
            if sentence != INTERRUPTED:
                say(sentence)
            raise typer.Exit(status) from None


@contextlib.contextmanager
def _stopped_by() -> Iterator[list[int]]:
    """While this lasts, signals that are to stop the run do so, and are listed."""
    stops: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        stops.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {}
    with contextlib.suppress(ValueError):  # only the main thread may; a server's worker keeps its own
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, stop)
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted(status: int) -> None:
    """Say how to go on, if `status` is an interrupted command's, wherever in it that was."""
    if status == 128 + signal.SIGINT:
        say(INTERRUPTED)


def say(sentence: str) -> None:
    """What went wrong, in a line on stderr; of several ranks the first to know says it."""
    if not speaks():
        return
    print(f"trim: {inert(sentence, stream=sys.stderr)}", file=sys.stderr)


def explain(problem: BaseException) -> tuple[int, str | None]:
    """Exit status and sentence for an exception; no sentence for those that are not ours to explain."""
    if isinstance(problem, TrimError):
        return problem.exit_status, str(problem)
    if isinstance(problem, KeyboardInterrupt):
        return 130, INTERRUPTED
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" writing {problem.filename}" if problem.filename else ""
        return 1, f"the disk is full{where}; free space or name an output on another disk (--cache-dir too)."
    if isinstance(problem, PermissionError) or (isinstance(problem, OSError) and problem.errno == errno.EROFS):
        what = f"no permission for {problem.filename or 'a file'} ({problem.strerror or problem})"
        return 1, f"{what}; choose another path or change its rights."
    if isinstance(problem, BrokenPipeError):
        # What is still to be flushed at exit goes nowhere, rather than fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, "what was to read the output closed it; the output is not whole."
    if isinstance(problem, OSError) and problem.strerror:
        return 1, f"{problem.filename or 'a file'} cannot be used ({problem.strerror}); choose another path."
    if isinstance(problem, MemoryError) or "out of memory" in str(problem).lower() or "can't allocate" in str(problem):
        return 1, "memory ran out; give a smaller --batch-size, --nsamples or --seqlen, or --device cpu."
    if not isinstance(problem, SystemExit | GeneratorExit | typer.Abort | typer.BadParameter):
        first = (str(problem).splitlines() or [""])[0]
        what = f"internal error, {type(problem).__name__}: {first}"
        return 1, f"{what}; set TRIM_TRACEBACK=1 for the traceback, and report it."
    return 1, None


def usage(problem: typer.TyperException, command: str) -> str:
    """One sentence for what typer found wrong with a command line. command: such as "trim prune"."""
    message = problem.format_message().replace("Value error, ", "").rstrip(".")
    wrong = re.search(r"for '(?P<flag>[^']*)': '(?P<value>.*?)' is not one of (?P<known>.*)", message)
    if wrong is not None:
        known = re.findall(r"'([^']*)'", wrong["known"])
        near = difflib.get_close_matches(wrong["value"], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"see {command} --help."
        return f"{wrong['flag']} {wrong['value']!r} is none of {', '.join(known)}; {hint}"
    proposal = re.fullmatch(r"(?P<wrong>.*?)\.? Did you mean (?P<near>.*)\?", message)
    if proposal is not None:
        return f"{proposal['wrong']}; did you mean {proposal['near']}?"
    return f"{message}; see {command} --help."
