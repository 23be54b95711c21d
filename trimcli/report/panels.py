"""Panels of plotly figures. Colours are CSS variables of the page, which also has the template of every axis."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

COLOURS = 6
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot")
MUTED = {"color": "var(--muted)", "width": 1.5, "dash": "dot"}
# Pixels between rows of panels, and below the last one: for ticks and titles.
GAP = 68
BELOW = 40


@dataclass(frozen=True)
class Figure:
    """A drawing. title: what it shows. caption: how to read it. choice: the run it belongs to, if to one."""

    section: str
    title: str
    caption: str
    plot: go.Figure
    choice: str | None = None


@dataclass(frozen=True)
class Panel:
    """One plot of several in a figure. x, y: what its axes have of their own."""

    title: str
    traces: Sequence[Any]
    x: dict[str, Any] = field(default_factory=dict)
    y: dict[str, Any] = field(default_factory=dict)


def grid(panels: Sequence[Panel], *, per_row: int, height: int) -> go.Figure:
    """Panels of the same kind in rows, each `height` pixels high; a name that several have is once in the legend."""
    across = min(per_row, len(panels))
    down = math.ceil(len(panels) / across)
    inside = down * height + (down - 1) * GAP
    cells: list[dict[str, Any] | None] = [{} if index < len(panels) else None for index in range(down * across)]
    plot = make_subplots(
        rows=down,
        cols=across,
        specs=[cells[start : start + across] for start in range(0, len(cells), across)],
        subplot_titles=[f"<b>{panel.title}</b>" if panel.title else "" for panel in panels],
        horizontal_spacing=0.24 / across,
        vertical_spacing=GAP / inside,
    )
    for index, panel in enumerate(panels):
        row, column = index // across + 1, index % across + 1
        plot.add_traces(panel.traces, rows=row, cols=column)
        plot.update_xaxes(panel.x, row=row, col=column)
        plot.update_yaxes(panel.y, row=row, col=column)
    legend: set[str] = set()
    for trace in plot.data:
        trace.legendgroup = trace.name
        trace.showlegend = trace.showlegend is not False and trace.name is not None and trace.name not in legend
        legend |= {trace.name} if trace.showlegend else set()
    titled = any(panel.title for panel in panels)
    above = (30 if legend else 0) + (28 if titled else 12)
    plot.update_annotations(font_size=12, yshift=4)
    plot.update_layout(
        template=None,
        height=inside + above + BELOW,
        margin={"t": above, "b": BELOW},
        showlegend=bool(legend),
        legend_y=1 + (28 if titled else 8) / inside,
    )
    return plot


def series(name: str, index: int) -> dict[str, Any]:
    """A line with markers whose colour, symbol and dash tell it from its neighbours."""
    return {
        "mode": "lines+markers",
        "name": name,
        "line": {"color": colour(index), "width": 2, "dash": DASHES[index // COLOURS % len(DASHES)]},
        "marker": {"color": colour(index), "size": 7, "symbol": SYMBOLS[index % len(SYMBOLS)]},
    }


def named(text: str) -> str:
    """A name as plotly shows it: neither HTML nor, in a hover template, a place for a value."""
    return escape(text).replace("%", "&#37;")


def colour(index: int) -> str:
    """A colour of the page's palette, which repeats."""
    return f"var(--colour-{index % COLOURS + 1})"


def colours(low: float, high: float, title: str, form: str) -> dict[str, Any]:
    """The scale of heat maps, of the page's colours: two of them where 0 lies inside. form: a d3 number format."""
    return {"cmin": low, "cmax": high, "colorbar": {"title": {"text": title}, "tickformat": form}}


def integers(values: Collection[int]) -> dict[str, Any]:
    """An axis with ticks at whole numbers, at most about ten of them."""
    least = math.ceil((max(values) - min(values) + 1) / 10)
    return {"tick0": 0, "dtick": next((step for step in (1, 2, 5, 10, 20, 50) if step >= least), 100)}
