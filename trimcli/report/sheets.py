"""Tables of a report as text, for Markdown, a terminal or a page: headings and cells, and what to read with them."""

from collections.abc import Sequence
from dataclasses import dataclass

from trimcli.files.manifest import ADAPTER, LAYER_SPARSITY, PACKED, PRUNED, ROWS
from trimcli.files.names import grouped
from trimcli.report.compare import MISSING, Column, Measure, Row, Table
from trimcli.report.forms import KINDS
from trimcli.report.gather import Gathered, Source


@dataclass(frozen=True)
class Sheet:
    """A table. words: how many columns, the first ones, are text; the others are numbers."""

    headings: Sequence[str]
    words: int
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def results(table: Table, columns: Sequence[Column], rows: Sequence[Row] | None = None) -> Sheet:
    """The comparison of runs, all or `rows` of them, with how each of `columns` was measured."""
    words = {"run": "label", "model": "model", "method": "method"}
    if len({row.model for row in table.rows}) < 2:
        del words["model"]
    named = {column: table.titles[column] for column in columns}
    alike = grouped(named, lambda column: f"{column.metric}, {column.setting}")
    notes = [f"{', '.join(named[column] for column in those)}: {setting}" for setting, those in alike.items()]
    cells = [
        [
            *(getattr(row, field) or MISSING for field in words.values()),
            percent(row.sparsity),
            *(shown(column, row.measures.get(column)) for column in columns),
        ]
        for row in (table.rows if rows is None else rows)
    ]
    return Sheet([*words, "sparsity", *named.values()], len(words), cells, notes)


def sparsities(gathered: Gathered, sources: Sequence[Source]) -> Sheet:
    """The sparsities that files hold."""
    cells = []
    for source in sources:
        layers = gathered.layers(source).values()
        span = f"{percent(min(layers))} to {percent(max(layers))}" if layers else ""
        count = str(len(source.sparsities())) if layers else ""
        method = f", {source.document['method']}" if source.schema == LAYER_SPARSITY else ""
        cells.append([source.label + method, KINDS[source.schema], count, percent(source.total), span])
    return Sheet(["file", "kind", "matrices", "sparsity", "layers, least to most"], 2, cells)


def qualities(gathered: Gathered) -> Sheet:
    """What TRIM gained, a line a file that tells."""
    cells = []
    for source in gathered.of(ROWS):
        if pairs := source.qualities().values():
            before, after = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            better = sum(best > even for even, best in pairs)
            cells.append([source.label, f"{better} of {len(pairs)}", f"{before:.6f}", f"{after:.6f}"])
    return Sheet(["file", "matrices improved", "mean quality, even rows", "mean quality, TRIM"], 1, cells)


def trainings(gathered: Gathered) -> Sheet:
    """What trainings did to the held-out loss, a line a phase."""
    cells = []
    for source in gathered.of(ADAPTER, PRUNED, PACKED):
        training = source.document.get("training") or {}
        for phase in training.get("phases", []):
            losses = dict(phase["heldout"])
            best = losses.get(phase["best"])
            first = phase["heldout"][0][1] if phase["heldout"] else None
            numbers = [MISSING if value is None else figure(value) for value in (first, best)]
            cells.append(
                [source.label, phase["phase"], training.get("teacher") or MISSING, str(phase["steps"]), *numbers]
            )
    return Sheet(["file", "training", "teacher", "steps", "held-out loss before", "after"], 3, cells)


def percent(fraction: float | None) -> str:
    """A sparsity as text."""
    return MISSING if fraction is None else f"{fraction:.2%}"


def shown(column: Column, measure: Measure | None) -> str:
    """A cell as text: four digits for scores, two decimals or whole numbers for perplexities."""
    if measure is None:
        return MISSING
    if measure.value is None:
        return "not finite"
    if "perplexity" in column.metric:
        return figure(measure.value, large=True)
    return figure(measure.value) + ("" if measure.stderr is None else f" ± {figure(measure.stderr)}")


def figure(value: float, *, large: bool = False) -> str:
    """A number as text. large: a perplexity, which may run into the thousands."""
    if not large:
        return f"{value:.4f}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"
