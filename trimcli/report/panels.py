"""Panels of plotly.js figures: axes, rows of panels, series. Colours are CSS variables of the page."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = 6
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot")
# Kinds of matrices are drawn in rows of so many panels.
PER_ROW = 4

Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A drawing. title: what it shows. caption: how to read it. choice: the run it belongs to, if to one."""

    section: str
    title: str
    caption: str
    spec: dict[str, Any]
    choice: str | None = None


def grid(
    panels: Sequence[tuple[str, list[Trace]]],
    *,
    per_row: int,
    height: int,
    x: Mapping[str, Any],
    y: Callable[[list[Trace]], Mapping[str, Any]],
    x_titles: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Panels of the same kind in rows. y(traces): the y axis of a panel. height: of a panel, in pixels."""
    across = min(per_row, len(panels))
    down = math.ceil(len(panels) / across)
    gap_x = {1: 0.0, 2: 0.09, 3: 0.08}.get(across, 0.06)
    gap = 74 if x_titles or x.get("title") else 56
    total = down * height + (down - 1) * gap
    width = (1 - gap_x * (across - 1)) / across
    layout: dict[str, Any] = {"annotations": []}
    data = []
    legend: set[str] = set()
    for index, (title, traces) in enumerate(panels):
        column, row = index % across, index // across
        suffix = "" if index == 0 else str(index + 1)
        left = column * (width + gap_x)
        top = 1 - row * (height + gap) / total
        layout[f"xaxis{suffix}"] = {
            **_axis(),
            **x,
            **(labelled(x_titles[index]) if x_titles else {}),
            "anchor": f"y{suffix}",
            "domain": [round(left, 4), round(left + width, 4)],
        }
        layout[f"yaxis{suffix}"] = {
            **_axis(),
            **y(traces),
            "anchor": f"x{suffix}",
            "domain": [round(max(top - height / total, 0), 4), round(top, 4)],
        }
        if title and (len(panels) > 1 or per_row == PER_ROW):
            layout["annotations"].append(_panel_title(title, left, top))
        for trace in traces:
            name = trace.get("legendgroup", "")
            first = bool(name) and name not in legend and trace.get("showlegend", True)
            legend |= {name} if first else set()
            data.append({**trace, "xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "showlegend": first})
    titled = bool(layout["annotations"])
    head = (30 if legend else 0) + (28 if titled else 12)
    foot = 52 if x.get("title") or x_titles else 34
    layout |= {
        "height": total + head + foot,
        "margin": {"l": 64, "r": 24, "t": head, "b": foot},
        "showlegend": bool(legend),
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1 + (28 if titled else 8) / total,
            "yanchor": "bottom",
        },
    }
    return {"data": data, "layout": layout}


def _axis() -> dict[str, Any]:
    return {
        "gridcolor": "var(--grid)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "var(--line)",
        "automargin": True,
    }


def labelled(text: str) -> dict[str, Any]:
    """An axis's title."""
    return {"title": {"text": text, "standoff": 10, "font": {"size": 13, "color": "var(--muted)"}}}


def _panel_title(text: str, left: float, top: float) -> dict[str, Any]:
    return {
        "text": f"<b>{text}</b>",
        "showarrow": False,
        "xref": "paper",
        "yref": "paper",
        "x": left,
        "xanchor": "left",
        "y": top,
        "yanchor": "bottom",
        "yshift": 4,
        "font": {"size": 12},
    }


def series(name: str, index: int) -> dict[str, Any]:
    """A line with markers whose colour, symbol and dash tell it from its neighbours."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "legendgroup": name,
        "line": {"color": colour(index), "width": 2, "dash": DASHES[index // COLOURS % len(DASHES)]},
        "marker": {"color": colour(index), "size": 7, "symbol": SYMBOLS[index % len(SYMBOLS)]},
    }


def colour(index: int) -> str:
    """A colour of the page's palette, which repeats."""
    return f"var(--colour-{index % COLOURS + 1})"


def colour_bar(title: str, form: str) -> dict[str, Any]:
    """The legend of a heat map; form: a d3 number format."""
    return {
        "title": {"text": title, "side": "top", "font": {"size": 12, "color": "var(--muted)"}},
        "tickformat": form,
        "tickfont": {"size": 12},
        "thickness": 12,
        "len": 1,
        "outlinewidth": 0,
        "ticks": "outside",
        "ticklen": 3,
    }


def integers(traces: Iterable[Mapping[str, Any]], along: str = "x") -> dict[str, Any]:
    """Tick layers at whole numbers, at most about ten of them."""
    values = [value for trace in traces for value in trace[along]]
    step = max(1, math.ceil((max(values) - min(values) + 1) / 10))
    step = next((nice for nice in (1, 2, 5, 10, 20, 50) if nice >= step), 100)
    return {"tick0": 0, "dtick": step}


def log_if_wide(traces: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A logarithmic axis where perplexities span more than a factor of four."""
    values = [value for trace in traces for value in trace["y"]]
    if max(values) > 4 * min(values):
        return {"type": "log", "tickformat": ",~r", "dtick": "D2"}
    return {"tickformat": ",~r"}
