"""The figures of what TRIM found: rows' sparsities, qualities, steps."""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from trimcli.files.manifest import ROWS
from trimcli.report.gather import QUANTILES, Place, Source, by_place, kinds_of, place_of
from trimcli.report.panels import PER_ROW, Figure, Trace, colour_bar, grid, integers, labelled

PANEL_HEIGHT = 190
LAYERS_APART = 20
# Beyond so many cells, numbers in them would overlap.
TEXT_CELLS = 320


def row_sparsity(source: Source) -> Figure | None:
    """Heat maps of the rows' sparsities, a panel a kind: a line a layer, rows from least to most sparse."""
    rows = source.row_sparsities()
    spread = max((float(values[-1] - values[0]) for values in rows.values()), default=0)
    if spread < 0.01:
        return None
    kinds = kinds_of(rows)
    panels = []
    for kind, short in kinds.items():
        members = {name: values for name, values in rows.items() if place_of(name).kind == kind}
        layers = sorted({place_of(name).layer for name in members})
        lines = [[v for n, v in members.items() if place_of(n).layer == layer] for layer in layers]
        heat = {
            "type": "heatmap",
            "x": [100 * (step + 0.5) / QUANTILES for step in range(QUANTILES)],
            "y": layers,
            "z": [[round(float(value), 4) for value in np.mean(found, axis=0)] for found in lines],
            "coloraxis": "coloraxis",
            "ygap": 1 if len(layers) <= LAYERS_APART else 0,
            "hovertemplate": f"{escape(short)}, layer %{{y}}<br>row quantile %{{x:.0f}}%: %{{z:.1%}}<extra></extra>",
        }
        panels.append((escape(short), [heat]))
    # A few extreme rows must not take the whole scale.
    low, high = np.quantile(np.stack(list(rows.values())), (0.005, 0.995))
    spec = grid(
        panels,
        per_row=PER_ROW,
        height=_heat_height(rows),
        x={
            "tickvals": [0, 50, 100],
            "ticktext": ["0%", "50%", "100%"],
            "range": [0, 100],
            "showgrid": False,
        },
        y=lambda traces: {"autorange": "reversed", "showgrid": False, **integers(traces, "y")},
    )
    spec["layout"]["coloraxis"] = {
        "colorscale": "var(--sequential)",
        "cmin": float(low),
        "cmax": float(high),
        "colorbar": colour_bar("sparsity", ".0%"),
    }
    return Figure(
        "Rows",
        "Row sparsity",
        "Across: a matrix's rows, from least to most sparse. Down: decoder layers.",
        spec,
        source.label,
    )


def quality(source: Source) -> Figure | None:
    """Quality of every matrix with even rows and with TRIM's, a panel a kind."""
    linears = source.document["linears"] if source.schema == ROWS else {}
    pairs = {
        name: (entry["quality_uniform"], entry["quality_best"])
        for name, entry in linears.items()
        if entry["quality_uniform"] is not None and entry["quality_best"] is not None
    }
    if not pairs:
        return None
    before = by_place({name: pair[0] for name, pair in pairs.items()})
    after = by_place({name: pair[1] for name, pair in pairs.items()})
    panels = [(escape(short), _before_and_after(before, after, kind)) for kind, short in kinds_of(pairs).items()]
    spec = grid(
        panels,
        per_row=PER_ROW,
        height=PANEL_HEIGHT,
        x=integers([trace for _, traces in panels for trace in traces]),
        y=lambda _: {"nticks": 4},
    )
    recipe = (source.document.get("options") or {}).get("recipe") or {}
    metric = (recipe.get("rows") or {}).get("qmetric", "quality")
    improved = sum(best > uniform for uniform, best in pairs.values())
    return Figure(
        "Rows",
        "Quality before and after",
        f"{metric} of outputs, dense against pruned, by decoder layer; higher is better. "
        f"Better in {improved} of {len(pairs)} matrices.",
        spec,
        source.label,
    )


def _before_and_after(before: Mapping[Place, float], after: Mapping[Place, float], kind: str) -> list[Trace]:
    layers = sorted(place.layer for place in before if place.kind == kind)
    mode = "lines+markers" if len(layers) <= LAYERS_APART else "lines"
    shared = {"type": "scatter", "mode": mode, "x": layers}
    hover = "layer %{x}: %{y:.6f}<extra></extra>"
    return [
        {
            **shared,
            "name": "even rows",
            "legendgroup": "even rows",
            "y": [before[Place(layer, kind)] for layer in layers],
            "line": {"color": "var(--muted)", "width": 1.5, "dash": "dot"},
            "marker": {"symbol": "circle-open", "size": 6, "color": "var(--muted)"},
            "hovertemplate": "even rows, " + hover,
        },
        {
            **shared,
            "name": "TRIM",
            "legendgroup": "TRIM",
            "y": [after[Place(layer, kind)] for layer in layers],
            "line": {"color": "var(--colour-1)", "width": 2},
            "marker": {"symbol": "circle", "size": 6, "color": "var(--colour-1)"},
            "hovertemplate": "TRIM, " + hover,
        },
    ]


def chosen_steps(source: Source) -> Figure | None:
    """The chosen step of every matrix: layers down, kinds across."""
    linears = source.document["linears"] if source.schema == ROWS else {}
    if not linears:
        return None
    steps = by_place({name: float(entry["step"] or 0) for name, entry in linears.items()})
    kinds = kinds_of(linears)
    layers = sorted({place.layer for place in steps})
    values = [[steps.get(Place(layer, kind)) for kind in kinds] for layer in layers]
    reach = max(0.01, *(abs(value) for value in steps.values()))
    few = len(layers) * len(kinds) <= TEXT_CELLS
    heat = {
        "type": "heatmap",
        "x": [escape(short) for short in kinds.values()],
        "y": layers,
        "z": values,
        "coloraxis": "coloraxis",
        "xgap": 2,
        "ygap": 2 if few else 0,
        "texttemplate": "%{z}" if few else None,
        "hovertemplate": "layer %{y}, %{x}<br>step %{z}<extra></extra>",
    }
    spec = grid(
        [("", [heat])],
        per_row=1,
        height=max(150, min((26 if len(layers) <= LAYERS_APART else 20) * len(layers), 960)),
        x={"showgrid": False, "type": "category"},
        y=lambda traces: {
            **labelled("decoder layer"),
            "autorange": "reversed",
            "showgrid": False,
            **integers(traces, "y"),
        },
    )
    spec["layout"]["coloraxis"] = {
        "colorscale": "var(--diverging)",
        "cmin": -reach,
        "cmax": reach,
        "colorbar": colour_bar("step", ".2f"),
    }
    caption = "Above 0, rows that lose least are pruned more; below 0, less; at 0 all rows alike."
    return Figure("Rows", "Chosen steps", caption, spec, source.label)


def _heat_height(rows: Mapping[str, Any]) -> int:
    """Pixels of a heat map panel: a few a layer, within reason."""
    layers = len({place_of(name).layer for name in rows})
    return max(90, min(14 * layers, 420))
