"""What a run says while it works: progress on stderr, nothing when stderr is no terminal or under --quiet."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

Advance = Callable[..., None]


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
def quiet_libraries() -> Iterator[None]:
    """Other libraries show no bar, warn of nothing in their logs and print nothing: they know nothing of --quiet."""
    import io
    import logging
    from unittest import mock

    from tqdm import tqdm  # type: ignore[import-untyped]

    initialise, disabled = tqdm.__init__, logging.root.manager.disable

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **{**kwargs, "disable": True})

    logging.disable(logging.WARNING)
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

        title, bar = progress.TextColumn("[progress.description]{task.description}"), progress.BarColumn(bar_width=28)
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
        bar = self._bars.add_task(description, total=total)
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
            self.console.print(Text.assemble(("warning: ", "yellow"), message), soft_wrap=True)
