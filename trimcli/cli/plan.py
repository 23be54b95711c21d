"""`trim plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimcli.cli.options import Model
from trimcli.cli.output import Say, rows_table, show, size, spread

if TYPE_CHECKING:
    from collections.abc import Callable

    from trimcli.commands.options import PruneOptions
    from trimcli.pipeline.fit import Fit
    from trimcli.pipeline.plan import Plan


def plan(
    model: Model,
    options: "PruneOptions",
    say: Say,
    output: Annotated[Path | None, typer.Option("--output", "-o", hidden=True)] = None,
) -> None:
    """Say what a prune would do, before any pass: matrices, targets, exact counts, memory, disk, forward passes.

    Takes the options of prune; a directory with no more than a config.json will do.

    Example: trim plan Qwen/Qwen2.5-72B --sparsity 0.7 --use-trim
    """
    from trimcli.commands.plan import foresee

    found = foresee(model, options, progress=say.progress)
    say.result(found.document, lambda: _print(found))


def _print(found: "Plan") -> None:
    from trimcli.files.names import grouped, kind_of, kinds_of, layer_of

    linears = {linear.name: linear for linear in found.linears}
    kinds = {name: kind for kind, names in kinds_of(linears).items() for name in names}
    groups = grouped(found.linears, lambda linear: (kinds[linear.name], linear.shape))
    rows = []
    for (name, shape), members in groups.items():
        target = spread([one.target.sparsity for one in members])
        patterns = sorted({":".join(map(str, one.target.pattern)) for one in members if one.target.pattern})
        target = f"{', '.join(patterns)} ({target})" if patterns else target
        zeros = f"{sum(one.zeros for one in members):,}"
        rows.append((name, str(len(members)), f"{shape[0]} x {shape[1]}", target, zeros))
    show(rows_table(("linear", "matrices", "shape", "target", "zeros"), rows), head(found))
    dense = grouped(found.dense.items(), lambda item: (kind_of(item[0]), *item[1]))
    for (name, sizes, why), left in dense.items():
        layers = len({layer_of(name) for name, _ in left})
        times = f", {len(left):,} of them" if len(left) > layers else ""
        times += f" in {layers} layers" if layers > 1 else ""
        show(f"left dense: {name} {' x '.join(map(str, sizes))}{times}: {why}")


def announcing(say: Say) -> "Callable[[Fit], None]":
    """What says how a stage keeps to memory: where limits are set or a choice is not the usual one."""

    def announce(fit: "Fit") -> None:
        memory = size(fit.host_bytes)
        if fit.device_bytes:
            memory = f"{size(fit.device_bytes)} on the device, {memory} on the host"
        if fit.limited or fit.why:
            say.note("\n".join([f"about {memory} of memory", *fit.why]))

    return announce


def head(plan: "Plan") -> str:
    """The plan in two lines, and one for every choice that is not the usual one."""
    memory = size(plan.host_bytes)
    if plan.device_bytes:
        memory = f"{size(plan.device_bytes)} on {plan.device}, {memory} on the host"
    spilled = f", hidden states ({size(plan.spill_bytes)}) in {plan.spill}" if plan.spill is not None else ""
    count = f"{plan.forward_passes:,.0f}" if plan.forward_passes >= 100 else f"{plan.forward_passes:.3g}"
    passes = f"{count} forward passes" if plan.forward_passes else "no forward pass"
    disk = size(plan.mask_bytes) + " of masks"
    if plan.model_bytes:
        disk += f", {size(plan.model_bytes)} of model"
    said = (
        f"{len(plan.linears)} matrices, {plan.weights:,} weights, {plan.zeros:,} to zero "
        f"({plan.zeros / plan.weights:.2%}), {len(plan.dense)} matrices left dense\n"
        f"{passes} in {plan.compute_dtype} on {plan.device}, about {memory} of memory{spilled}, {disk}"
    )
    return "\n".join([said, *plan.why])
