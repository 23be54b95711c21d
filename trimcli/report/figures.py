"""The figures of a report: results, layers, allocation; those of the rows come from `rows`."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from trimcli.files.manifest import LAYER_SPARSITY, MASKS, PACKED, PRUNED, RESULTS, ROWS
from trimcli.files.names import grouped, layer_index, layer_of, list_of
from trimcli.report.compare import Table
from trimcli.report.gather import Gathered, Source
from trimcli.report.panels import MUTED, Figure, Panel, colour, grid, integers, named, series
from trimcli.report.rows import row_figures
from trimcli.report.training import training_figure

LABELLED_LAYERS = 12
METRIC_NAMES = {"owl": "outlier share", "alpha": "tail exponent"}


def figures(gathered: Gathered) -> list[Figure]:
    """Every figure that the given files have the numbers for."""
    found = [_perplexity(gathered.table), _layers(gathered), _allocation(gathered), training_figure(gathered)]
    commands = {source.document.get("command_line") for source in gathered.of(ROWS)}
    for source in gathered.of(ROWS, MASKS):
        # A prune's masks and its statistics tell the same rows' sparsities.
        if source.schema == ROWS or source.document.get("command_line") not in commands - {None}:
            found += row_figures(source)
    return [figure for figure in found if figure]


def _perplexity(table: Table) -> Figure | None:
    """Perplexity against sparsity: a panel a column of the table, a line a method."""
    methods = dict.fromkeys(row.method for row in table.rows if row.method != "dense" and row.sparsity is not None)
    panels = []
    for column in [column for column in table.columns if column.kind == "perplexity"]:
        points = [(row, value) for row, value in table.measured(column) if row.sparsity is not None]
        traces = []
        for index, method in enumerate(methods):
            line = [(row, value) for row, value in points if row.method == method]
            if line:
                trace = go.Scatter(
                    **series(named(method) or "other", index),
                    x=[row.sparsity for row, _ in line],
                    y=[value for _, value in line],
                    customdata=[named(row.label) for row, _ in line],
                    hovertemplate="%{customdata}<br>sparsity %{x:.2%}<br>perplexity %{y:,.2f}<extra></extra>",
                )
                traces.append(trace)
        if traces:
            sparsities = [sparsity for trace in traces for sparsity in trace.x]
            # The dense perplexity is a line below those of the pruned models.
            across = [min(sparsities) - 0.02, max(sparsities) + 0.02]
            look = {"mode": "lines", "name": "dense", "line": MUTED}
            for row, value in (point for point in points if point[0].method == "dense"):
                hover = f"{named(row.label)}, dense<br>perplexity %{{y:,.2f}}<extra></extra>"
                traces.append(go.Scatter(look, x=across, y=[value, value], hovertemplate=hover))
            values = [value for trace in traces for value in trace.y]
            wide = {"type": "log", "dtick": "D2"} if max(values) > 4 * min(values) else {}
            panels.append(Panel(named(table.titles[column]), traces, y={"tickformat": ",~r", **wide}))
    if not panels:
        return None
    plot = grid(panels, per_row=3, height=330)
    plot.update_xaxes(title_text="sparsity", tickformat=".0%")
    plot.update_yaxes(title_text="perplexity")
    return Figure("Results", "Perplexity against sparsity", "Lower is better.", plot)


def _layers(gathered: Gathered) -> Figure | None:
    """Sparsity by layer: a line a run through its layers' means, a dot a linear."""
    traces: list[go.Scatter] = []
    drawn: list[dict[str, float]] = []
    for source in gathered.of(MASKS, PRUNED, PACKED, RESULTS):
        values = {name: round(value, 3) for name, value in source.sparsities().items() if value >= 0.001}
        if values and values not in drawn:
            linears, means = source.sparsities(), gathered.layers(source)
            lists = grouped(linears, list_of)
            for where, names in lists.items():  # a decoder's layers, and perhaps a vision tower's
                label = source.label if len(lists) == 1 else f"{source.label}, {where or 'in no layer'}"
                style = series(named(label), len(traces) // 2)
                dots = go.Scatter(
                    name=style["name"],
                    mode="markers",
                    showlegend=False,
                    x=[layer_index(name) for name in names],
                    y=[linears[name] for name in names],
                    customdata=[named(name) for name in names],
                    marker={"color": colour(len(traces) // 2), "size": 5, "opacity": 0.35},
                    hovertemplate="%{customdata}<br>%{y:.2%}<extra></extra>",
                )
                hover = f"{style['name']}<br>layer %{{x}}: %{{y:.2%}}<extra></extra>"
                layers = sorted(dict.fromkeys(map(layer_of, names)), key=layer_index)
                x, y = [layer_index(layer) for layer in layers], [means[layer] for layer in layers]
                traces += [dots, go.Scatter(**style, x=x, y=y, hovertemplate=hover)]
            drawn.append(values)
    if not traces:
        return None
    numbers = {layer_index(name) for values in drawn for name in values}
    plot = grid([Panel("", traces, x=integers(numbers))], per_row=1, height=340)
    plot.update_xaxes(title_text="layer")
    plot.update_yaxes(title_text="sparsity", tickformat=".0%")
    return Figure("Sparsity", "Sparsity by layer", "Lines: whole layers. Dots: their matrices.", plot)


def _allocation(gathered: Gathered) -> Figure | None:
    """Layer allocation against the metric behind it: a panel a metric, a series a ratios file."""
    series_of: dict[str, list[go.Scatter]] = {}
    for index, source in enumerate(gathered.of(LAYER_SPARSITY)):
        metric = source.document.get("metric") or {}
        known = {name: value for name, value in source.sparsities().items() if metric.get(name) is not None}
        points = [(metric[name], value, layer_index(name), name) for name, value in known.items()]
        if points:
            series_of.setdefault(_metric_name(source), []).append(_allocation_points(source, index, points))
    if not series_of:
        return None
    for traces in series_of.values():
        # Several allocations from one metric have their points above each other: one line of numbers is enough.
        for trace in traces[:-1]:
            trace.mode = "markers"
    panels = [Panel("", traces, x={"title_text": named(name)}) for name, traces in series_of.items()]
    plot = grid(panels, per_row=2, height=340)
    plot.update_yaxes(title_text="sparsity", tickformat=".0%")
    caption = "A point is a layer, or a matrix where a layer's differ; numbers are layers."
    return Figure("Sparsity", "Layer allocation against its metric", caption, plot)


def _metric_name(source: Source) -> str:
    """What the allocation is made from, with the parameter that defines it."""
    method, parameters = str(source.document["method"]), source.document.get("parameters") or {}
    name = METRIC_NAMES.get(method, f"metric of {method}")
    if parameters.get("hyper_m") is not None:
        return f"{name} (M = {parameters['hyper_m']:g})"
    return f"{name} ({parameters['ww_metric']})" if parameters.get("ww_metric") else name


def _allocation_points(source: Source, index: int, points: Sequence[tuple[Any, ...]]) -> go.Scatter:
    """One point where the linears of a layer agree; otherwise one a linear."""
    layers: dict[int, set[tuple[float, float]]] = {}
    for metric, value, layer, _ in points:
        layers.setdefault(layer, set()).add((round(metric, 9), round(value, 9)))
    whole = all(len(found) == 1 for found in layers.values())
    if whole:
        points = [(*next(iter(found)), layer, f"layer {layer}") for layer, found in layers.items()]
    metrics, values, numbers, names = zip(*points, strict=True)
    label = named(source.label)
    return go.Scatter(
        {
            **series(label, index),
            "mode": "markers+text" if whole and len(layers) <= LABELLED_LAYERS else "markers",
            "x": metrics,
            "y": values,
            "text": [str(number) for number in numbers] if whole else None,
            "textposition": "middle right",
            "textfont": {"size": 11, "color": "var(--muted)"},
            "customdata": [named(name) for name in names],
            "hovertemplate": f"{label}<br>%{{customdata}}<br>metric %{{x:.4g}}<br>%{{y:.2%}}<extra></extra>",
        }
    )
