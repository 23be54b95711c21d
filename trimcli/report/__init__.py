"""Reports of one or several runs: HTML with figures, Markdown for a model card, and for the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from trimcli.artifacts import RESULTS, atomic_file, refuse_existing
from trimcli.compare import percent, render
from trimcli.errors import OptionError
from trimcli.report.gather import Gathered, by_layer, gather, sparsity_by_linear, structure_of
from trimcli.report.origin import WHAT

__all__ = ["Format", "build_report", "summary"]

Format = Literal["html", "md"]


def build_report(files: Sequence[Path], format: Format, output: Path, *, force: bool = False) -> Gathered:
    """Write a report of `files` to `output`: results, layer ratios, masks, row statistics, model directories.

    Files are recognised by their schema, in any number and order; what they have no numbers for is left out.
    format: `html`, one file with everything in it, or `md`. Returns what was read, for `summary`. Raises
    OptionError (no files, unknown format), InputError, MismatchError (a file that is none of these) and
    OutputExists.
    """
    if format not in get_args(Format):
        raise OptionError(f"--format {format!r} is none of {', '.join(get_args(Format))}.")
    if not files:
        raise OptionError("a report needs files; give results, masks, layer ratios, statistics or model directories.")
    refuse_existing(output, force=force)
    gathered = gather(files)
    if format == "html":
        from trimcli.report.html import page
    else:
        from trimcli.report.markdown import page
    text = page(gathered)
    with atomic_file(output, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return gathered


def summary(gathered: Gathered) -> RenderableType:
    """The same for a terminal: the comparison of results, and the files with the sparsities they hold."""
    parts: list[RenderableType] = []
    if gathered.table.rows:
        parts += [render(gathered.table), Text("")]
    others = [source for source in gathered.sources if source.schema != RESULTS]
    if others:
        drawn = RichTable(box=None, pad_edge=False, header_style="bold")
        for heading in ("file", "kind"):
            drawn.add_column(heading, overflow="fold")
        for heading in ("sparsity", "layers, least to most"):
            drawn.add_column(heading, justify="right")
        for source in others:
            values = sparsity_by_linear(source) or source.document.get("sparsity") or {}
            layers: dict[int, float] = {}
            if isinstance(values, dict):
                structure = structure_of(source)
                layers = by_layer(values, {name: gathered.weights.get((structure, name), 1) for name in values})
            total = source.document.get("target", source.document.get("sparsity"))
            span = f"{percent(min(layers.values()))} to {percent(max(layers.values()))}" if layers else ""
            drawn.add_row(
                Text(source.label),
                WHAT[source.schema],
                percent(total) if isinstance(total, float) else "",
                span,
            )
        parts.append(drawn)
    return Group(*parts)
