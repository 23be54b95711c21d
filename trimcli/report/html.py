"""The report as one HTML file: no network, light and dark."""

from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from trimcli.report.compare import Column, Row, Table, model_of
from trimcli.report.figures import figures
from trimcli.report.forms import KINDS
from trimcli.report.gather import Gathered
from trimcli.report.provenance import facts_of
from trimcli.report.sheets import figure, results


def page(gathered: Gathered) -> str:
    """The whole page. What comes from the files is escaped; plotly.js is within where there is a figure."""
    drawn = figures(gathered)
    models = dict.fromkeys(model_of(source.document) for source in gathered.sources if source.document.get("model"))
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_text("page.html.jinja"))
    return template.render(
        title=", ".join(models) or "Report",
        version=version("trimcli"),
        css=Markup(_text("page.css")),
        script=Markup(_text("page.js")),
        plotly=Markup(get_plotlyjs()) if drawn else "",
        # Plotly writes JSON that cannot end the script element it stands in.
        figures_json=Markup(f"[{','.join(drawing.plot.to_json() for drawing in drawn)}]"),
        headline=_headline(gathered.table),
        tables=_tables(gathered.table),
        notes=gathered.table.notes,
        figures=list(enumerate(drawn)),
        choices=list(dict.fromkeys(drawing.choice for drawing in drawn if drawing.choice is not None)),
        origins=[(source.label, KINDS[source.schema], facts_of(source)) for source in gathered.sources],
    )


def _text(name: str) -> str:
    return (files("trimcli.report") / name).read_text(encoding="utf-8")


def _headline(table: Table) -> list[tuple[str, str, str]]:
    """Name, value and detail of the dense perplexity, and of the best one at the two highest sparsities."""
    column = next((column for column in table.columns if column.kind == "perplexity"), None)
    if column is None:
        return []
    dense = table.dense(column)
    found = [("Dense perplexity", figure(dense, large=True), column.group)] if dense else []
    pruned = [
        (round(row.sparsity, 2), value, row.method or row.label)
        for row, value in table.measured(column)
        if row.method != "dense" and row.sparsity is not None
    ]
    for share in sorted({share for share, _, _ in pruned})[-2:]:
        best, name = min((value, name) for at, value, name in pruned if at == share)
        cost = f" · {best / dense:.2f} times dense" if dense else ""
        found.append((f"Best at {share:.0%} sparsity", figure(best, large=True), name + cost))
    return found


def _tables(table: Table) -> list[dict[str, Any]]:
    """Perplexities with their ratio to the dense model, accuracies and task metrics."""
    found = []
    headed = (("Perplexity", {"perplexity"}), ("Accuracy", {"accuracy"}), ("Tasks", {"task", "mean"}))
    for title, kinds in headed:
        columns = [column for column in table.columns if column.kind in kinds]
        rows = [row for row in table.rows if not row.measures.keys().isdisjoint(columns)]
        sheet = results(table, columns, rows)
        lines = []
        for row, cells in zip(rows, sheet.rows, strict=True):
            words, (sparsity, *measured) = cells[: sheet.words], cells[sheet.words :]
            numbers = [_number(table, row, *pair) for pair in zip(columns, measured, strict=True)]
            lines.append({"dense": row.method == "dense", "words": words, "sparsity": sparsity, "numbers": numbers})
        if lines:
            found.append({"title": title, "sheet": sheet, "lines": lines})
    return found


def _number(table: Table, row: Row, column: Column, cell: str) -> tuple[str, str]:
    """A cell as its value and what stands small beside it: the standard error, or the ratio to the dense model."""
    value, _, spread = cell.partition(" ± ")
    if spread:
        return value, f"± {spread}"
    measure, dense = row.measures.get(column), table.dense(column)
    if column.kind == "perplexity" and row.method != "dense" and dense and measure and measure.value:
        return value, f"\u00d7 {measure.value / dense:.2f}"
    return value, ""
