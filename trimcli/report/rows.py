"""The figures of what TRIM found: rows' sparsities, qualities, steps."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from trimcli.files.manifest import ROWS
from trimcli.files.names import grouped, kinds_of, layer_index
from trimcli.report.gather import QUANTILES, Source
from trimcli.report.panels import MUTED, Figure, Panel, colours, grid, integers, named

PER_ROW = 4
LAYERS_APART = 20
# Beyond so many cells, numbers in them would overlap.
TEXT_CELLS = 320


def row_figures(source: Source) -> list[Figure | None]:
    """What a masks or statistics file tells of its rows."""
    return [_row_sparsity(source), _quality(source), _chosen_steps(source)]


def by_kind(values: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Kind of matrix -> layer -> its matrix's value, a number or an array; several (experts) make their mean."""
    return {
        kind: {
            layer: np.mean([values[name] for name in members], axis=0).tolist()
            for layer, members in sorted(grouped(mine, layer_index).items())
        }
        for kind, mine in kinds_of(values).items()
    }


def short_names(kinds: Collection[str]) -> list[str]:
    """`q_proj` for `self_attn.q_proj`, but `attn.c_proj` beside `mlp.c_proj`."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return [named(end if last.count(end) == 1 else kind) for kind, end in zip(kinds, last, strict=True)]


def _row_sparsity(source: Source) -> Figure | None:
    """Heat maps of the rows' sparsities, a panel a kind: a line a layer, rows from least to most sparse."""
    rows = source.row_sparsities()
    if max((values[-1] - values[0] for values in rows.values()), default=0) < 0.01:
        return None
    kinds = by_kind(rows)
    panels = []
    for name, layers in zip(short_names(kinds), kinds.values(), strict=True):
        heat = go.Heatmap(
            x=[(step + 0.5) / QUANTILES for step in range(QUANTILES)],
            y=list(layers),
            z=[[round(value, 4) for value in quantiles] for quantiles in layers.values()],
            coloraxis="coloraxis",
            ygap=1 if len(layers) <= LAYERS_APART else 0,
            hovertemplate=f"{name}, layer %{{y}}<br>row quantile %{{x:.0%}}: %{{z:.1%}}<extra></extra>",
        )
        panels.append(Panel(name, [heat], y=integers(layers)))
    most = max(len(layers) for layers in kinds.values())
    plot = grid(panels, per_row=PER_ROW, height=max(90, min(14 * most, 420)))
    plot.update_xaxes(tickvals=[0, 0.5, 1], tickformat=".0%", range=[0, 1], showgrid=False)
    plot.update_yaxes(autorange="reversed", showgrid=False)
    # A few extreme rows must not take the whole scale.
    low, high = np.quantile(list(rows.values()), (0.005, 0.995)).tolist()
    plot.update_layout(coloraxis=colours(low, high, "sparsity", ".0%"))
    caption = "Across: a matrix's rows, from least to most sparse. Down: decoder layers."
    return Figure("Rows", "Row sparsity", caption, plot, source.label)


def _quality(source: Source) -> Figure | None:
    """Quality of every matrix with even rows and with TRIM's, a panel a kind."""
    pairs = source.qualities()
    if not pairs:
        return None
    kinds = by_kind(pairs)
    panels = []
    for name, layers in zip(short_names(kinds), kinds.values(), strict=True):
        mode = "lines+markers" if len(layers) <= LAYERS_APART else "lines"
        even, trim = zip(*layers.values(), strict=True)
        looks = [
            ("even rows", even, MUTED, "circle-open"),
            ("TRIM", trim, {"color": "var(--colour-1)", "width": 2}, "circle"),
        ]
        traces = [
            go.Scatter(name=who, mode=mode, x=list(layers), y=found, line=line, marker={"symbol": symbol, "size": 6})
            for who, found, line, symbol in looks
        ]
        panels.append(Panel(name, traces, x=integers(layers)))
    plot = grid(panels, per_row=PER_ROW, height=190)
    plot.update_traces(hovertemplate="%{fullData.name}, layer %{x}: %{y:.6f}<extra></extra>")
    plot.update_yaxes(nticks=4)
    recipe = (source.document.get("options") or {}).get("recipe") or {}
    rows = recipe.get("rows")
    metric = rows.get("qmetric") if isinstance(rows, Mapping) else recipe.get("qmetric")
    improved = sum(best > even for even, best in pairs.values())
    caption = (
        f"{metric or 'quality'} of outputs, dense against pruned, by decoder layer; higher is better. "
        f"Better in {improved} of {len(pairs)} matrices."
    )
    return Figure("Rows", "Quality before and after", caption, plot, source.label)


def _chosen_steps(source: Source) -> Figure | None:
    """The chosen step of every matrix: layers down, kinds across."""
    linears = source.document["linears"] if source.schema == ROWS else {}
    if not linears:
        return None
    kinds = by_kind({name: entry["step"] or 0.0 for name, entry in linears.items()})
    layers = sorted({layer for steps in kinds.values() for layer in steps})
    few = len(layers) * len(kinds) <= TEXT_CELLS
    heat = go.Heatmap(
        x=short_names(kinds),
        y=layers,
        z=[[steps.get(layer) for steps in kinds.values()] for layer in layers],
        coloraxis="coloraxis",
        xgap=2,
        ygap=2 if few else 0,
        texttemplate="%{z}" if few else None,
        hovertemplate="layer %{y}, %{x}<br>step %{z}<extra></extra>",
    )
    height = (26 if len(layers) <= LAYERS_APART else 20) * len(layers)
    plot = grid([Panel("", [heat], y=integers(layers))], per_row=1, height=max(150, min(height, 960)))
    plot.update_xaxes(showgrid=False, type="category")
    plot.update_yaxes(title_text="decoder layer", autorange="reversed", showgrid=False)
    reach = max(0.01, *(abs(step) for steps in kinds.values() for step in steps.values()))
    plot.update_layout(coloraxis=colours(-reach, reach, "step", ".2f"))
    caption = "Above 0, rows that lose least are pruned more; below 0, less; at 0 all rows alike."
    return Figure("Rows", "Chosen steps", caption, plot, source.label)
