"""Tables that several commands print."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from trimcli.cli import common

if TYPE_CHECKING:
    from trimcli.files.ratios import LayerSparsity
    from trimcli.pipeline.plan import Plan

BAR = 24


def by_layer(values: Mapping[str, float]) -> dict[str, list[float]]:
    """Values of linears grouped by their decoder layer's name (up to the first number in the path)."""
    found: dict[str, list[float]] = {}
    for name, value in values.items():
        match = re.match(r"(.*?\.\d+)\.", name)
        found.setdefault(match[1] if match else name, []).append(value)
    return found


def bar(fraction: float, width: int = BAR) -> str:
    """A bar of `fraction` of the width."""
    return "█" * round(fraction * width)


def print_allocation(found: "LayerSparsity", output: Path) -> None:
    """The allocation by decoder layer, with the metric behind it."""
    table = Table(
        title=f"{found.method}, target {found.target:.4g}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("layer")
    table.add_column("metric", justify="right")
    table.add_column("sparsity", justify="right")
    table.add_column("")
    metrics = by_layer({name: value for name, value in found.metric.items() if value is not None})
    for layer, values in by_layer(found.sparsity).items():
        mean = sum(values) / len(values)
        spread = f"{min(values):.4f} to {max(values):.4f}" if max(values) - min(values) > 1e-9 else f"{mean:.4f}"
        metric = metrics.get(layer)
        table.add_row(layer, f"{sum(metric) / len(metric):.4g}" if metric else "", spread, bar(mean))
    common.show(table, f"written to {output}")


def plan_table(plan: "Plan") -> Table:
    """One row a shape and target: how many matrices, weights, zeros."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for linear in plan.linears:
        short = re.sub(r"^.*?\.\d+\.", "", linear.name)
        pattern = ":".join(map(str, linear.target.pattern)) if linear.target.pattern else ""
        groups.setdefault((short, linear.shape), []).append((linear, pattern))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, justify in (
        ("linear", "left"),
        ("matrices", "right"),
        ("shape", "right"),
        ("target", "right"),
        ("zeros", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for (short, shape), members in groups.items():
        targets = [linear.target.sparsity for linear, _ in members]
        spread = (
            f"{min(targets):.4f}" if max(targets) - min(targets) < 1e-9 else f"{min(targets):.4f} to {max(targets):.4f}"
        )
        patterns = sorted({pattern for _, pattern in members if pattern})
        target = ", ".join(patterns) + f" ({spread})" if patterns else spread
        zeros = sum(linear.zeros for linear, _ in members)
        table.add_row(short, str(len(members)), f"{shape[0]} x {shape[1]}", target, f"{zeros:,}")
    return table


def plan_head(plan: "Plan") -> str:
    """The plan in two lines."""
    memory = common.size(plan.host_bytes)
    if plan.device_bytes:
        memory = f"{common.size(plan.device_bytes)} on {plan.device}, {memory} on the host"
    passes = f"{plan.forward_passes:g} forward passes" if plan.forward_passes else "no forward pass"
    disk = common.size(plan.mask_bytes) + " of masks"
    if plan.model_bytes:
        disk += f", {common.size(plan.model_bytes)} of model"
    return (
        f"{len(plan.linears)} matrices, {plan.weights:,} weights, {plan.zeros:,} to zero "
        f"({plan.zeros / plan.weights:.2%}), {len(plan.dense)} matrices left dense\n"
        f"{passes} in {plan.compute_dtype} on {plan.device}, about {memory} of memory, {disk}"
    )


def rows_table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A plain table. columns: (header, justify)."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for place, (header, justify) in enumerate(columns):
        table.add_column(header, justify=justify, overflow="fold", no_wrap=place > 0)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*row)
    return table
