"""`trim bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimcli.cli.output import Say, rows_table, show, size

if TYPE_CHECKING:
    from rich.table import Table

    from trimcli.kernels.bench import BenchResult, Products
    from trimcli.kernels.options import BenchOptions


def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Pruned or dense models, or exports of `trim export`.")
    ],
    options: "BenchOptions",
    say: Say,
) -> None:
    """Tokens per second and bytes, dense against sparse, on this machine, and whether sparsity pays here.

    A model is measured dense and with its pruned matrices in the forms that the device has sparse products for: bitmap,
    keep bits and kept values, and csr on a CPU, semi-structured for 2:4 on a CUDA device; an export dense and as it was
    exported. Every shape of matrix is raced, too, beside the time that copying as many bytes takes.

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
    tables = [table, *(_products(one) for one in result.products)]
    show(*tables, *(f"\n{sentence}" for sentence in result.verdicts))


def _products(products: "Products") -> "Table":
    rows = [
        [
            f"{one.shape[0]} x {one.shape[1]}",
            f"{one.count}",
            f"{one.zeros:.2%}",
            *(f"{1e3 * seconds:.3f}" for seconds in one.seconds.values()),
            *(f"{1e3 * one.floor[form]:.3f}" for form in ("dense", "bitmap")),
        ]
        for one in products.shapes
    ]
    forms = list(products.shapes[0].seconds)
    headers = ["matrix", "count", "zeros", *forms, "dense copied", "bitmap copied"]
    name = Path(products.model).name
    return rows_table(headers, rows, f"{name}: milliseconds of a product with one input row, medians", words=[])
