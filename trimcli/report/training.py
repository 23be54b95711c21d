"""The figure of a training: losses by step."""

from typing import Any

import plotly.graph_objects as go

from trimcli.files.manifest import ADAPTER, PACKED, PRUNED
from trimcli.report.gather import Gathered, Source
from trimcli.report.panels import Figure, Panel, colour, grid, named, series


def training_figure(gathered: Gathered) -> Figure | None:
    """Held-out loss, and thin behind it the training's own, by step: a colour a file, phases in a row."""
    sources = [source for source in gathered.of(ADAPTER, PRUNED, PACKED) if source.document.get("training")]
    traces = [trace for index, source in enumerate(sources) for trace in _curves(source, index)]
    if not traces:
        return None
    plot = grid([Panel("", traces)], per_row=1, height=340)
    plot.update_xaxes(title_text="step")
    plot.update_yaxes(title_text="loss, nats a token")
    caption = (
        "Markers: next-token loss of held-out samples. Thin lines: what was minimised, the teacher's part included."
    )
    return Figure("Training", "Loss by step", caption, plot)


def _curves(source: Source, index: int) -> list[go.Scatter]:
    label, start = named(source.label), 0
    loss: list[tuple[int, float]] = []
    heldout: list[tuple[int, float]] = []
    for phase in source.document["training"]["phases"]:
        loss += [(start + step, value) for step, value in phase["loss"]]
        heldout += [(start + step, value) for step, value in phase["heldout"]]
        start += phase["steps"]
    thin: dict[str, Any] = {"color": colour(index), "width": 1}
    hover = f"{label}<br>step %{{x}}: %{{y:.4f}}<extra></extra>"
    found = [go.Scatter(name=label, mode="lines", showlegend=False, opacity=0.4, line=thin, hovertemplate=hover)]
    found.append(go.Scatter(**series(label, index), hovertemplate=hover))
    for trace, curve in zip(found, (loss, heldout), strict=True):
        trace.x, trace.y = [step for step, _ in curve], [value for _, value in curve]
    return found
