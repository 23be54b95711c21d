"""`trim export`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimcli.cli.options import output
from trimcli.cli.output import Say, facts, show, size

if TYPE_CHECKING:
    from trimcli.commands.export import ExportSummary
    from trimcli.kernels.options import ExportOptions


def export(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A pruned directory, ordinary or packed (or a hub id).")],
    output: Annotated[Path, output("directory")],
    options: "ExportOptions",
    say: Say,
) -> None:
    """Write a pruned model in a form that sparse kernels read, for this machine.

    csr: every pruned matrix is timed with one input row, dense and as csr, and stays dense where that is as fast.
    semi-structured: needs matrices that are 2:4 and a CUDA GPU. trimcli.load_exported(DIR) loads what is
    written; trim bench measures it.

    Example: trim export Qwen2.5-3B-90 --to csr -o Qwen2.5-3B-90-csr
    """
    from trimcli.commands.export import export as run

    found = run(model, output, options, force=say.force, progress=say.progress)
    linears = {name: linear.document() for name, linear in found.linears.items()}
    say.result(lambda: {**asdict(found), "linears": linears, "sparse": found.sparse}, lambda: _print(found))


def _print(summary: "ExportSummary") -> None:
    # Lines rather than a table: names are long, and a narrow terminal or a pipe would cut them.
    width = max(map(len, summary.linears))
    for name, linear in summary.linears.items():
        zeros = linear.zeros / (linear.shape[0] * linear.shape[1])
        words = [f"{name:<{width}}", f"{zeros:7.2%} zeros"]
        if linear.dense_seconds is not None and linear.sparse_seconds is not None:
            dense, sparse = linear.dense_seconds * 1e6, linear.sparse_seconds * 1e6
            words.append(f"dense {dense:6.0f} µs, {summary.to} {sparse:6.0f} µs")
        words.append(linear.form + (f" ({linear.reason})" if linear.reason else ""))
        show("  ".join(words))
    share = summary.nbytes / summary.dense_bytes
    nothing = f"no matrix is faster as {summary.to} on this machine: nothing is gained"
    facts(
        {
            "export": summary.output,
            "matrices": f"{summary.sparse} of {len(summary.linears)} as {summary.to}, the others dense",
            "bytes": f"{size(summary.nbytes)}, dense {size(summary.dense_bytes)} ({share:.1%})",
            "note": None if summary.sparse else nothing,
        }
    )
