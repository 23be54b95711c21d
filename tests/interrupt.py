"""A progress that interrupts a run, as Ctrl-C would, when a task begins, and remembers what it saw."""

import contextlib
from collections.abc import Iterator

from trimcli.console import Advance


class Interrupted(KeyboardInterrupt):
    """Raised in place of Ctrl-C, so that a real one still ends the tests."""


class InterruptAt:
    """Interrupts when a task whose description starts with `title` begins for the `times`-th time; None: never.

    seen: the descriptions of all tasks. warnings: what it was warned of.
    """

    def __init__(self, title: str | None, times: int = 1) -> None:
        self._title, self._left = title, times
        self.seen: list[str] = []
        self.warnings: list[str] = []

    @contextlib.contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        self.seen.append(description)
        if self._title is not None and description.startswith(self._title):
            self._left -= 1
            if self._left == 0:
                raise Interrupted
        yield lambda count=1: None

    def warn(self, message: str) -> None:
        self.warnings.append(message)
