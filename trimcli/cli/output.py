"""What a command prints: one JSON document, or tables and facts for people. No torch at import time."""

import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimcli.console import OBEYED, RichProgress, inert, well_formed
from trimcli.console import size as size
from trimcli.errors import OptionError
from trimcli.files.atomic import recover
from trimcli.files.documents import finite_or_none, is_stdout
from trimcli.files.manifest import COMMAND_LINE
from trimcli.world import is_first

if TYPE_CHECKING:
    from rich.table import Table

BAR = 24


@dataclass(frozen=True)
class Say:
    """How a command speaks; of several ranks the first one does.

    given: names of the parameters on the command line. streams: its output is stdout.
    """

    quiet: bool
    as_json: bool
    force: bool
    given: Collection[str]
    streams: bool
    progress: RichProgress

    @classmethod
    def start(cls, values: Mapping[str, Any], given: Collection[str]) -> "Say":
        """Progress on stderr; libraries' own chatter off; the command line noted for manifests.

        What an earlier run was killed while replacing is put back. Raises OptionError for two documents on stdout.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        COMMAND_LINE.set(well_formed(shlex.join(["trim", *sys.argv[1:]])))
        streams = values.get("output") is not None and is_stdout(values["output"])
        if streams and values["as_json"]:
            raise OptionError(f"--json and -o {values['output']} both write to standard output; drop one of the two.")
        for value in values.values() if is_first() else ():
            for part in value if isinstance(value, list | tuple) else (value,):
                if isinstance(part, str | Path):
                    recover(Path(part), sweep=False)
        quiet = bool(values["quiet"]) or not is_first()
        return cls(quiet, values["as_json"] and is_first(), values["force"], given, streams, RichProgress(quiet=quiet))

    def result(self, document: Callable[[], Any], people: Callable[[], None]) -> None:
        """What was found: `document()` as JSON, or `people()` prints it; neither under --quiet or -o -."""
        if self.as_json:
            emit_json(document())
        elif not self.quiet and not self.streams:
            people()

    def note(self, text: str) -> None:
        """A line on stderr before long work."""
        if not self.quiet:
            print(inert(text, lines=True, stream=sys.stderr), file=sys.stderr)


def emit_json(document: Any) -> None:
    """One JSON document on stdout; NaN and infinity become null, paths and enums strings."""

    def plain(value: Any) -> Any:
        return well_formed(str(value)) if isinstance(value, Path | Enum) else list(value)

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}"

    # JSON escapes what a terminal obeys, and what another encoding than UTF-8 may lack.
    ascii_only = (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8"
    text = json.dumps(finite_or_none(document), indent=1, ensure_ascii=ascii_only, default=plain)
    print(OBEYED.sub(escaped, text))


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
            table.add_row(Text(inert(name)), Text(inert(str(value))))
    show(table)


def show(*parts: Any) -> None:
    """Print tables and lines on stdout. In a file or a pipe, a table is as wide as it is: no name is cut short."""
    from rich.console import Console

    console = Console(emoji=False, markup=False)
    for part in parts:
        if isinstance(part, str):
            print(inert(part, lines=True))
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

    heading = title and Text(inert(title))
    table = Table(title=heading, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for place, header in enumerate(headers):
        left = place == 0 or header in ("", *words)
        table.add_column(Text(inert(header)), justify="left" if left else "right", overflow="fold", no_wrap=place > 0)
    for row in rows:
        table.add_row(*(Text(inert(cell)) for cell in row))
    return table


def bar(fraction: float, width: int = BAR) -> str:
    """A bar of `fraction` of the width."""
    return "█" * round(fraction * width)


def spread(values: Sequence[float]) -> str:
    """The values' range, or the one that all have, to four digits."""
    low, high = min(values), max(values)
    return f"{low:.4f} to {high:.4f}" if high - low > 1e-9 else f"{low:.4f}"
