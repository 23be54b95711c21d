"""`trim bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimcli.cli.output import Say, rows_table, show, size

if TYPE_CHECKING:
    from trimcli.kernels.bench import BenchResult
    from trimcli.kernels.options import BenchOptions


def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Pruned or dense models, or exports of `trim export`.")
    ],
    options: "BenchOptions",
    say: Say,
) -> None:
    """Tokens per second and bytes, dense against sparse, on this machine, and whether sparsity pays here.

    A model is measured dense and with its pruned matrices in the form that the device has sparse kernels for; an
    export dense and as it was exported.

    Example: trim bench Qwen2.5-3B-90 Qwen2.5-3B-90-csr
    """
    from trimcli.kernels.bench import bench as run

    found = run(models, options, progress=say.progress)
    say.result(lambda: found.document, lambda: _print(found))


def _print(result: "BenchResult") -> None:
    rates = [f"{rate.phase} b{rate.batch}" for rate in result.measured[0].rates]
    rows = [
        [
            Path(one.model).name,
            one.form if one.form == "dense" else f"{one.form} {one.sparse}/{one.linears}",
            f"{one.zeros:.2%}",
            "" if one.disk is None else size(one.disk),
            size(one.memory),
            *(f"{rate.median:,.1f}" for rate in one.rates),
        ]
        for one in result.measured
    ]
    headers = ["model", "form", "zeros", "disk", "memory", *rates]
    table = rows_table(headers, rows, "tokens per second, medians; b: batch", words=["form"])
    show(table, *(f"\n{sentence}" for sentence in result.verdicts))
