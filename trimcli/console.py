"""What a run says while it works: progress on stderr, nothing when stderr is no terminal or under --quiet.

And text as any stream and any terminal takes it.
"""

import codecs
import contextlib
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TextIO

Advance = Callable[..., None]

# What trim itself prints that is no ASCII, and its stand-in for streams that lack it.
PLAIN = {"█": "#", "±": "+-", "\u00d7": "x", "µ": "u", "\u2013": "-", "·": "-", "…": "..."}
# What a terminal obeys rather than shows: control characters, and those that turn the direction of text.
OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
ERRORS = "trim.plain"


def _plain(problem: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding lacks: PLAIN, or an escape. A handler of `codecs`."""
    if not isinstance(problem, UnicodeEncodeError):
        raise problem
    lacking = problem.object[problem.start : problem.end]
    escaped = [PLAIN.get(one) or one.encode("ascii", "backslashreplace").decode() for one in lacking]
    return "".join(escaped), problem.end


codecs.register_error(ERRORS, _plain)


def prepare_streams() -> None:
    """From here on stdout and stderr take every text, whatever their encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)


def well_formed(text: str) -> str:
    """`text` as UTF-8 can hold it: a path's bytes that the locale could not read as UTF-8, if they are, or escaped."""
    try:
        text.encode()
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeEncodeError):
            return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return text.encode("utf-8", "backslashreplace").decode()
    return text


def inert(text: str, *, lines: bool = False, stream: TextIO | None = None) -> str:
    """`text` to print on `stream`, stdout if not given, which it neither steers nor breaks. lines: it has several."""

    def shown(found: re.Match[str]) -> str:
        return found[0] if lines and found[0] in "\n\t" else found[0].encode("unicode_escape").decode()

    encoding = (stream or sys.stdout).encoding or "utf-8"
    return OBEYED.sub(shown, well_formed(text)).encode(encoding, ERRORS).decode(encoding)


def size(nbytes: float) -> str:
    """Bytes for people: 1.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"


class Progress(Protocol):
    """Where long work reports to."""

    def task(self, description: str, total: int) -> contextlib.AbstractContextManager[Advance]:
        """A bar of `total` steps; the yielded function advances it by its argument (1 if none)."""

    def warn(self, message: str) -> None:
        """Say something the user should know, once, in a line."""


class NoProgress:
    """Reports nothing: the library's default."""

    @contextlib.contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """A bar nobody sees."""
        yield lambda count=1: None

    def warn(self, message: str) -> None:
        """Python's own warning, so that library callers can see or silence it."""
        warnings.warn(message, stacklevel=3)


NO_PROGRESS = NoProgress()


@contextlib.contextmanager
def quiet_libraries(*, errors: bool = False) -> Iterator[None]:
    """Other libraries show no bar, warn of nothing in their logs and print nothing: they know nothing of --quiet.

    errors: they log no errors, either, where what they raise is told.
    """
    import logging
    from unittest import mock

    from tqdm import tqdm  # type: ignore[import-untyped]

    initialise, disabled = tqdm.__init__, logging.root.manager.disable

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **{**kwargs, "disable": True})

    logging.disable(logging.ERROR if errors else logging.WARNING)
    try:
        with mock.patch.object(tqdm, "__init__", silent), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


class RichProgress:
    """Bars with rate and remaining time on stderr; warnings as lines there."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet)
        self._bars: Any = None
        self._said: set[str] = set()

    def _make(self) -> Any:
        from rich import progress
        from rich.text import Text

        class Rate(progress.ProgressColumn):
            def render(self, task: Any) -> Any:
                speed = task.finished_speed or task.speed
                return Text(f"{speed:,.1f}/s" if speed else "", style="progress.data.speed")

        title = progress.TextColumn("{task.description}", style="progress.description", markup=False)
        bar = progress.BarColumn(bar_width=28)
        times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
        hidden = not self.console.is_terminal or self.console.quiet
        columns = (title, bar, progress.MofNCompleteColumn(), Rate(), *times)
        return progress.Progress(*columns, console=self.console, transient=True, disable=hidden)

    @contextlib.contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """A bar of `total` steps; nested tasks stack below it."""
        outermost = self._bars is None
        if outermost:
            self._bars = self._make()
            self._bars.start()
        bar = self._bars.add_task(inert(description, stream=sys.stderr), total=total)
        try:
            yield lambda count=1: self._bars.advance(bar, count)
        finally:
            self._bars.remove_task(bar)
            if outermost:
                self._bars.stop()
                self._bars = None

    def warn(self, message: str) -> None:
        """One yellow line, the first time."""
        from rich.text import Text

        if message not in self._said:
            self._said.add(message)
            said = inert(message, stream=sys.stderr)
            self.console.print(Text.assemble(("warning: ", "yellow"), said), soft_wrap=True)
