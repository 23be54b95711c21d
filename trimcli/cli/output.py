"""What a command prints: one JSON document, or tables and facts for people. No torch at import time."""

import contextlib
import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimcli.console import RichProgress
from trimcli.files.documents import finite_or_none
from trimcli.files.manifest import COMMAND_LINE

if TYPE_CHECKING:
    from rich.table import Table

BAR = 24


@dataclass(frozen=True)
class Say:
    """How a command speaks. given: names of the parameters that stood on the command line."""

    quiet: bool
    as_json: bool
    force: bool
    given: Collection[str]
    progress: RichProgress

    @classmethod
    def start(cls, values: Mapping[str, Any], given: Collection[str]) -> "Say":
        """Progress on stderr; libraries' own chatter off; the command line noted for manifests."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        with contextlib.suppress(ValueError):  # only the main thread may; a server's worker keeps its own
            # Leave as after Ctrl-C, so that nothing half-written stays.
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        COMMAND_LINE.set(shlex.join(["trim", *sys.argv[1:]]))
        quiet = bool(values["quiet"])
        return cls(quiet, values["as_json"], values["force"], given, RichProgress(quiet=quiet))

    def result(self, document: Callable[[], Any], people: Callable[[], None]) -> None:
        """What was found: `document()` as JSON, or `people()` prints it; neither under --quiet alone."""
        if self.as_json:
            emit_json(document())
        elif not self.quiet:
            people()

    def note(self, text: str) -> None:
        """A line on stderr before long work."""
        if not self.quiet:
            print(text, file=sys.stderr)


def emit_json(document: Any) -> None:
    """One JSON document on stdout; NaN and infinity become null, paths and enums strings."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path | Enum) else list(value)

    print(json.dumps(finite_or_none(document), indent=1, ensure_ascii=False, default=plain))


def size(nbytes: float) -> str:
    """Bytes for people: 1.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"


def memory(document: Mapping[str, int]) -> str:
    """Peak memory for people."""
    return ", ".join(f"{size(nbytes)} {kind}" for kind, nbytes in document.items())


def facts(rows: Mapping[str, Any]) -> None:
    """A summary on stdout: names and values in two columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            table.add_row(Text(name), Text(str(value)))
    show(table)


def show(*parts: Any) -> None:
    """Print tables and lines on stdout. In a file or a pipe, a table is as wide as it is: no name is cut short."""
    from rich.console import Console

    console = Console(emoji=False, markup=False)
    for part in parts:
        if isinstance(part, str):
            print(part)
            continue
        if not console.is_terminal:
            unlimited = console.options.update(max_width=10_000)
            console.width = max(console.width, console.measure(part, options=unlimited).maximum)
        console.print(part)


def rows_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, *, words: Collection[str] = ()
) -> "Table":
    """A plain table: text in the first column, those of `words` and a bar's (headed ""), numbers in the others."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title and Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for place, header in enumerate(headers):
        left = place == 0 or header in ("", *words)
        table.add_column(Text(header), justify="left" if left else "right", overflow="fold", no_wrap=place > 0)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def bar(fraction: float, width: int = BAR) -> str:
    """A bar of `fraction` of the width."""
    return "█" * round(fraction * width)


def spread(values: Sequence[float]) -> str:
    """The values' range, or the one that all have, to four digits."""
    low, high = min(values), max(values)
    return f"{low:.4f} to {high:.4f}" if high - low > 1e-9 else f"{low:.4f}"
