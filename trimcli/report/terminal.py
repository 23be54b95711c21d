"""The report's summary for a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from trimcli.files.manifest import LAYER_SPARSITY, RESULTS
from trimcli.report.compare import percent, render
from trimcli.report.gather import Gathered, Source
from trimcli.report.origin import WHAT


def summary(gathered: Gathered) -> RenderableType:
    """The comparison of all results, and the other files with the sparsities they hold."""
    parts: list[RenderableType] = [render(gathered.table)] if gathered.table.rows else []
    others = [source for source in gathered.sources if source.schema != RESULTS]
    if others:
        parts += [Text(""), _files(gathered, others)] if parts else [_files(gathered, others)]
    return Group(*parts)


def _files(gathered: Gathered, sources: list[Source]) -> RichTable:
    drawn = RichTable(box=None, pad_edge=False, header_style="bold")
    for heading in ("file", "kind"):
        drawn.add_column(heading, overflow="fold")
    for heading in ("sparsity", "layers, least to most"):
        drawn.add_column(heading, justify="right")
    for source in sources:
        total = source.document.get("target" if source.schema == LAYER_SPARSITY else "sparsity")
        layers = gathered.layers(source).values()
        drawn.add_row(
            Text(source.label),
            WHAT[source.schema],
            percent(total) if isinstance(total, float) else "",
            f"{percent(min(layers))} to {percent(max(layers))}" if layers else "",
        )
    return drawn
