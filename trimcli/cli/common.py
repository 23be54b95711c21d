"""What the commands share: options, the error boundary, and how results are printed. No torch at import time."""

import contextlib
import contextvars
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimcli.errors import ResourceError, TrimError, UsageError
from trimcli.files.documents import finite_or_none

if TYPE_CHECKING:
    from trimcli.console import RichProgress

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A directory in Hugging Face format, or a hub id such as Qwen/Qwen2.5-3B."),
]
RUN = "Run"
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda or cuda:N.", rich_help_panel=RUN)]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of the computation: auto, float32, bfloat16 or float16. auto takes the model's own where the device "
        "computes in it natively, else float32.",
        rich_help_panel=RUN,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.", rich_help_panel=RUN)]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no summary; errors only.", rich_help_panel=RUN)]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout instead of tables.", rich_help_panel=RUN),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace an existing output; a directory only if trim made it.", rich_help_panel=RUN),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="The stage cache (default: in the user's cache folder).", rich_help_panel=RUN),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model brings.", rich_help_panel=RUN)
]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.", rich_help_panel=RUN)]
Numerics = Annotated[
    str,
    typer.Option(
        help="exact: counts hold to the weight. reference: the published code's arithmetic, to reproduce its results."
    ),
]


def _unused(*names: str) -> Any:
    return typer.Option(*names, hidden=True)


# What every command takes, so that one set of flags fits a whole Makefile; not shown where it changes nothing.
EVERYWHERE: dict[str, tuple[Any, Any]] = {
    "device": (Annotated[str, _unused("--device")], "auto"),
    "dtype": (Annotated[str, _unused("--dtype")], "auto"),
    "seed": (Annotated[int, _unused("--seed")], 0),
    "quiet": (Annotated[bool, _unused("--quiet")], False),
    "as_json": (Annotated[bool, _unused("--json")], False),
    "force": (Annotated[bool, _unused("--force")], False),
    "cache_dir": (Annotated[Path | None, _unused("--cache-dir")], None),
    "trust_remote_code": (Annotated[bool, _unused("--trust-remote-code")], False),
    "revision": (Annotated[str | None, _unused("--revision")], None),
}


def boundary(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function: errors become one sentence and an exit status, options of all commands are taken.

    A traceback is shown only under TRIM_TRACEBACK=1.
    """
    signature = inspect.signature(function)
    unused = {name: entry for name, entry in EVERYWHERE.items() if name not in signature.parameters}

    @functools.wraps(function)
    def guarded(**options: Any) -> None:
        try:
            # In a context of its own: the command line it notes for manifests is its own, too.
            used = {name: value for name, value in options.items() if name not in unused}
            contextvars.copy_context().run(function, **used)
        except typer.Exit:
            raise
        except BaseException as problem:
            if os.environ.get("TRIM_TRACEBACK") == "1" and not isinstance(problem, KeyboardInterrupt):
                raise
            status, sentence = explain(problem)
            if sentence is None:
                raise
            print(f"trim: {sentence}", file=sys.stderr)
            raise typer.Exit(status) from None

    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in unused.items()
    ]
    guarded.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    guarded.__annotations__ = function.__annotations__ | {name: annotation for name, (annotation, _) in unused.items()}
    return guarded


def explain(problem: BaseException) -> tuple[int, str | None]:
    """Exit status and sentence for an exception; no sentence for those that are not ours to explain."""
    import errno

    if isinstance(problem, UsageError | TrimError):
        return problem.exit_status, str(problem)
    if isinstance(problem, KeyboardInterrupt):
        return 130, "interrupted; repeat the command: calibrate, prune and sweep go on where they stopped."
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" writing {problem.filename}" if problem.filename else ""
        full = ResourceError(
            f"the disk is full{where}; free space or name an output on another disk (--cache-dir too)."
        )
        return full.exit_status, str(full)
    if isinstance(problem, PermissionError):
        return 2, f"no permission for {problem.filename}; choose another path or change its rights."
    if isinstance(problem, MemoryError) or "out of memory" in str(problem).lower() or "can't allocate" in str(problem):
        return 1, "memory ran out; give a smaller --batch-size, --nsamples or --seqlen, or --device cpu."
    if isinstance(problem, Exception) and not isinstance(problem, typer.Abort | typer.BadParameter):
        first = (str(problem).splitlines() or [""])[0]
        return 1, (
            f"internal error, {type(problem).__name__}: {first}; set TRIM_TRACEBACK=1 for the traceback, and report it."
        )
    return 1, None


def start(quiet: bool, as_json: bool) -> "RichProgress":
    """Progress on stderr; libraries' own chatter off; the command line noted for manifests."""
    import shlex
    import signal
    import warnings

    from trimcli.console import RichProgress
    from trimcli.files.manifest import COMMAND_LINE

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    with contextlib.suppress(ValueError):  # only the main thread may; a server's worker keeps its own
        signal.signal(signal.SIGTERM, _terminated)
    COMMAND_LINE.set(shlex.join(["trim", *sys.argv[1:]]))
    return RichProgress(quiet=quiet)


def _terminated(number: int, _: Any) -> None:
    """Leave as after Ctrl-C, so that nothing half-written stays."""
    raise SystemExit(128 + number)


def emit_json(document: Any) -> None:
    """One JSON document on stdout; NaN and infinity become null, paths and enums strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path | Enum):
            return str(value)
        return list(value)

    print(json.dumps(finite_or_none(_plain(document)), indent=1, ensure_ascii=False, default=plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def split(text: str | None) -> tuple[str, ...]:
    """A comma-separated option as its parts."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def size(nbytes: float) -> str:
    """Bytes for people: 1.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")


def memory(document: Mapping[str, int]) -> str:
    """Peak memory for people."""
    return ", ".join(f"{size(nbytes)} {kind}" for kind, nbytes in document.items())


def facts(rows: Mapping[str, Any]) -> None:
    """A summary on stdout: names and values in two columns."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    show(table)


def show(*parts: Any) -> None:
    """Print tables and lines on stdout.

    Where stdout is no terminal, a table is as wide as it is: a name cut short is of no use in a file or a pipe.
    """
    from rich.console import Console

    console = Console()
    for part in parts:
        if isinstance(part, str):
            print(part)
            continue
        if not console.is_terminal:
            unlimited = console.options.update(max_width=10_000)
            console.width = max(console.width, console.measure(part, options=unlimited).maximum)
        console.print(part)
