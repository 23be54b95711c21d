"""The figures of a report: results, layers, allocation; those of the rows come from `rows`."""

from collections.abc import Sequence
from html import escape
from typing import Any

from trimcli.files.manifest import LAYER_SPARSITY, MASKS, PACKED, PRUNED, RESULTS, ROWS
from trimcli.report.compare import Column, Row, titles
from trimcli.report.gather import Gathered, Source, place_of, sparsity_by_linear
from trimcli.report.panels import Figure, Trace, colour, grid, integers, labelled, log_if_wide, series
from trimcli.report.rows import chosen_steps, quality, row_sparsity

LABELLED_LAYERS = 12
METRIC_NAMES = {"owl": "outlier share", "alpha": "tail exponent"}


def figures(gathered: Gathered) -> list[Figure]:
    """Every figure that the given files have the numbers for."""
    found = [_perplexity(gathered), _layers(gathered), _allocation(gathered)]
    shown: list[Figure | None] = []
    commands = {source.document.get("command_line") for source in gathered.of(ROWS)}
    for source in gathered.of(ROWS, MASKS):
        # A prune's masks and its statistics tell the same rows' sparsities.
        if source.schema == MASKS and source.document.get("command_line") in commands - {None}:
            continue
        shown += [row_sparsity(source), quality(source), chosen_steps(source)]
    return [figure for figure in [*found, *shown] if figure]


def _perplexity(gathered: Gathered) -> Figure | None:
    """Perplexity against sparsity: a panel a column of the table, a line a method."""
    rows = [row for row in gathered.table.rows if row.sparsity is not None]
    columns = [column for column in gathered.table.columns if column.kind == "perplexity"]
    methods = list(dict.fromkeys(row.method for row in rows if row.method != "dense"))
    panels = []
    for column in columns:
        traces = []
        for index, method in enumerate(methods):
            points = [row for row in rows if row.method == method and _value(row, column) is not None]
            if points:
                traces.append(_perplexity_line(points, column, escape(method) or "other", index))
        dense = [row for row in rows if row.method == "dense" and _value(row, column) is not None]
        if dense and traces:
            traces += _dense_lines(dense, column, [x for trace in traces for x in trace["x"]])
        if traces:
            panels.append((column, traces))
    if not panels:
        return None
    named = titles([column for column, _ in panels])
    spec = grid(
        [(escape(named[column]), traces) for column, traces in panels],
        per_row=3,
        height=330,
        x={**labelled("sparsity"), "tickformat": ".0%"},
        y=lambda traces: {**labelled("perplexity"), **log_if_wide(traces)},
    )
    return Figure("Results", "Perplexity against sparsity", "Lower is better.", spec)


def _value(row: Row, column: Column) -> float | None:
    measure = row.measures.get(column)
    return measure.value if measure else None


def _perplexity_line(points: Sequence[Row], column: Column, name: str, index: int) -> Trace:
    return {
        **series(name, index),
        "x": [row.sparsity for row in points],
        "y": [_value(row, column) for row in points],
        "customdata": [escape(row.label) for row in points],
        "hovertemplate": "%{customdata}<br>sparsity %{x:.2%}<br>perplexity %{y:,.2f}<extra></extra>",
    }


def _dense_lines(dense: Sequence[Row], column: Column, sparsities: Sequence[float]) -> list[Trace]:
    """The dense perplexity as a line below those of the pruned models."""
    ends = [min(sparsities) - 0.02, max(sparsities) + 0.02]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "dense",
            "legendgroup": "dense",
            "x": ends,
            "y": [_value(row, column)] * 2,
            "line": {"color": "var(--muted)", "width": 1.5, "dash": "dot"},
            "hovertemplate": f"{escape(row.label)}, dense<br>perplexity %{{y:,.2f}}<extra></extra>",
        }
        for row in dense
    ]


def _layers(gathered: Gathered) -> Figure | None:
    """Sparsity by layer: a line a run through its layers' means, a dot a linear."""
    traces: list[Trace] = []
    drawn: list[dict[str, float]] = []
    for source in gathered.of(MASKS, PRUNED, PACKED, RESULTS):
        values = {name: round(value, 3) for name, value in sparsity_by_linear(source).items() if value >= 0.001}
        if not values or values in drawn:
            continue
        traces += _layer_line(gathered, source, len(drawn))
        drawn.append(values)
    if not traces:
        return None
    spec = grid(
        [("", traces)],
        per_row=1,
        height=340,
        x={**labelled("decoder layer"), **integers(traces)},
        y=lambda _: {**labelled("sparsity"), "tickformat": ".0%"},
    )
    return Figure("Sparsity", "Sparsity by layer", "Lines: whole layers. Dots: their matrices.", spec)


def _layer_line(gathered: Gathered, source: Source, index: int) -> list[Trace]:
    sparsity, means = sparsity_by_linear(source), gathered.layers(source)
    label = escape(source.label)
    line = {
        **series(label, index),
        "x": list(means),
        "y": list(means.values()),
        "hovertemplate": f"{label}<br>layer %{{x}}: %{{y:.2%}}<extra></extra>",
    }
    dots = {
        **series(label, index),
        "mode": "markers",
        "showlegend": False,
        "x": [place_of(name).layer for name in sparsity],
        "y": list(sparsity.values()),
        "customdata": [escape(name) for name in sparsity],
        "marker": {"color": colour(index), "size": 5, "opacity": 0.35, "symbol": "circle"},
        "hovertemplate": "%{customdata}<br>%{y:.2%}<extra></extra>",
    }
    return [dots, line]


def _allocation(gathered: Gathered) -> Figure | None:
    """Layer allocation against the metric behind it: a panel a metric, a series a ratios file."""
    panels: dict[str, list[Trace]] = {}
    for index, source in enumerate(gathered.of(LAYER_SPARSITY)):
        metric = source.document.get("metric") or {}
        points = [
            (metric[name], value, place_of(name).layer, name)
            for name, value in source.document["sparsity"].items()
            if metric.get(name) is not None
        ]
        if points:
            panels.setdefault(_metric_name(source), []).append(_allocation_points(source, index, points))
    if not panels:
        return None
    for traces in panels.values():
        # Several allocations from one metric have their points above each other: one line of numbers is enough.
        for trace in traces[:-1]:
            trace["mode"] = "markers"
    spec = grid(
        [("", traces) for traces in panels.values()],
        per_row=2,
        height=340,
        x={},
        y=lambda _: {**labelled("sparsity"), "tickformat": ".0%"},
        x_titles=[escape(name) for name in panels],
    )
    caption = "A point is a layer, or a matrix where a layer's differ; numbers are layers."
    return Figure("Sparsity", "Layer allocation against its metric", caption, spec)


def _metric_name(source: Source) -> str:
    """What the allocation is made from, with the parameter that defines it."""
    method, parameters = str(source.document["method"]), source.document.get("parameters") or {}
    name = METRIC_NAMES.get(method, f"metric of {method}")
    if parameters.get("hyper_m") is not None:
        return f"{name} (M = {parameters['hyper_m']:g})"
    return f"{name} ({parameters['ww_metric']})" if parameters.get("ww_metric") else name


def _allocation_points(source: Source, index: int, points: Sequence[tuple[Any, ...]]) -> Trace:
    """One point where the linears of a layer agree; otherwise one a linear."""
    layers: dict[int, set[tuple[float, float]]] = {}
    for metric, value, layer, _ in points:
        layers.setdefault(layer, set()).add((round(metric, 9), round(value, 9)))
    whole = all(len(found) == 1 for found in layers.values())
    if whole:
        points = [(*next(iter(found)), layer, f"layer {layer}") for layer, found in layers.items()]
    label = escape(source.label)
    return {
        **series(label, index),
        "mode": "markers+text" if whole and len(layers) <= LABELLED_LAYERS else "markers",
        "x": [point[0] for point in points],
        "y": [point[1] for point in points],
        "text": [str(point[2]) for point in points] if whole else None,
        "textposition": "middle right",
        "textfont": {"size": 11, "color": "var(--muted)"},
        "customdata": [escape(point[3]) for point in points],
        "hovertemplate": f"{label}<br>%{{customdata}}<br>metric %{{x:.4g}}<br>%{{y:.2%}}<extra></extra>",
    }
