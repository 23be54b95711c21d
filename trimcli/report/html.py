"""The report as one HTML file: no network, light and dark."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from trimcli.files.documents import finite_or_none
from trimcli.report.compare import MISSING, Column, Row, Table, figure, percent, settings, shown, titles
from trimcli.report.figures import figures
from trimcli.report.gather import Gathered
from trimcli.report.origin import WHAT, facts_of
from trimcli.report.panels import Figure


def page(gathered: Gathered) -> str:
    """The whole page. What comes from the files is escaped; plotly.js is within where there is a figure."""
    drawn = figures(gathered)
    numbered = [
        {**asdict(drawing), "number": number, "height": drawing.spec["layout"]["height"]}
        for number, drawing in enumerate(drawn)
    ]
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_text("page.html.jinja"))
    return template.render(
        title=", ".join(gathered.models) or "Report",
        version=version("trimcli"),
        css=Markup(_text("page.css")),
        script=Markup(_text("page.js")),
        plotly=Markup(get_plotlyjs()) if drawn else "",
        figures_json=_script_json([drawing.spec for drawing in drawn]),
        facts=_facts(gathered.table),
        tables=_tables(gathered.table),
        notes=gathered.table.notes,
        sections={
            section: [one for one in numbered if one["section"] == section] for section in ("Results", "Sparsity")
        },
        choices=_choices(drawn, numbered),
        origins=[
            {"label": source.label, "what": WHAT[source.schema], "facts": facts_of(source)}
            for source in gathered.sources
        ],
    )


def _text(name: str) -> str:
    return (files("trimcli.report") / name).read_text(encoding="utf-8")


def _script_json(document: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(finite_or_none(document), ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _choices(drawn: Sequence[Figure], numbered: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    labels = dict.fromkeys(drawing.choice for drawing in drawn if drawing.choice is not None)
    return [{"label": label, "figures": [one for one in numbered if one["choice"] == label]} for label in labels]


def _facts(table: Table) -> list[dict[str, str]]:
    """The headline: dense perplexity, and the best one at the highest sparsity."""
    column = next((column for column in table.columns if column.kind == "perplexity"), None)
    if column is None:
        return []
    measured = [
        (row, value)
        for row in table.rows
        if column in row.measures and (value := row.measures[column].value) is not None
    ]
    found = []
    dense = next(((row, value) for row, value in measured if row.method == "dense"), None)
    if dense:
        found.append(_fact("Dense perplexity", figure(dense[1], large=True), column.group))
    pruned = [(row, value) for row, value in measured if row.method != "dense" and row.sparsity is not None]
    for share in sorted({round(row.sparsity or 0, 2) for row, _ in pruned})[-2:]:
        best, value = min(
            ((row, value) for row, value in pruned if round(row.sparsity or 0, 2) == share),
            key=lambda pair: pair[1],
        )
        cost = f" · {value / dense[1]:.2f} times dense" if dense else ""
        found.append(
            _fact(f"Best at {share:.0%} sparsity", figure(value, large=True), (best.method or best.label) + cost)
        )
    return found


def _fact(name: str, value: str, detail: str) -> dict[str, str]:
    return {"name": name, "value": value, "detail": detail}


def _tables(table: Table) -> list[dict[str, Any]]:
    """Perplexities with their ratio to the dense model, and task metrics."""
    found = []
    for title, kinds in (("Perplexity", ("perplexity",)), ("Tasks", ("task", "mean"))):
        columns = [column for column in table.columns if column.kind in kinds]
        rows = [row for row in table.rows if any(column in row.measures for column in columns)]
        if not rows:
            continue
        named = titles(columns)
        several = len({row.model for row in table.rows}) > 1
        found.append(
            {
                "title": title,
                "stacked": title == "Tasks",
                "text_headings": ["Run", "Model", "Method"] if several else ["Run", "Method"],
                "headings": [named[column] for column in columns],
                "settings": settings(named),
                "rows": [
                    {
                        "texts": [row.label, *([row.model] if several else []), row.method or MISSING],
                        "sparsity": percent(row.sparsity),
                        "dense": row.method == "dense",
                        "cells": [_cell(rows, row, column) for column in columns],
                    }
                    for row in rows
                ],
            }
        )
    return found


def _cell(rows: Sequence[Row], row: Row, column: Column) -> dict[str, str]:
    value, _, spread = shown(column, row.measures.get(column)).partition(" ± ")
    if spread:
        return {"value": value, "detail": f"± {spread}"}
    measure = row.measures.get(column)
    dense = next(
        (other.measures[column].value for other in rows if other.method == "dense" and column in other.measures),
        None,
    )
    if column.kind == "perplexity" and measure and measure.value and dense and row.method != "dense":
        return {"value": value, "detail": f"\u00d7 {measure.value / dense:.2f}"}
    return {"value": value, "detail": ""}
