"""Tables for a terminal."""

from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from trimcli.console import inert
from trimcli.files.manifest import RESULTS
from trimcli.report.compare import Table
from trimcli.report.gather import Gathered
from trimcli.report.sheets import Sheet, results, sparsities


def summary(gathered: Gathered) -> RenderableType:
    """The comparison of all results, and the other files with the sparsities they hold."""
    parts: list[RenderableType] = [comparison(gathered.table)] if gathered.table.rows else []
    others = [source for source in gathered.sources if source.schema != RESULTS]
    if others:
        parts += [Text()] if parts else []
        parts.append(_drawn(sparsities(gathered, others)))
    return Group(*parts)


def comparison(table: Table) -> RenderableType:
    """The main columns of a comparison, and below them how each was measured."""
    sheet = results(table, [column for column in table.columns if column.main])
    drawn = _drawn(sheet)
    drawn.caption = Text("\n".join(map(inert, [*sheet.notes, *table.notes])), "dim not italic")
    return drawn


def _drawn(sheet: Sheet) -> RichTable:
    """What files say is no markup: every cell is a Text."""
    drawn = RichTable(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    for place, heading in enumerate(sheet.headings):
        justify: Literal["left", "right"] = "left" if place < sheet.words else "right"
        drawn.add_column(Text(inert(heading)), justify=justify, overflow="fold", no_wrap=heading == "sparsity")
    for row in sheet.rows:
        drawn.add_row(*(Text(inert(cell)) for cell in row))
    return drawn
