"""`trim demo`."""

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimcli.cli.options import run_option
from trimcli.cli.output import Say, rows_table, show, size

if TYPE_CHECKING:
    from trimcli.demo.run import DemoResult


def demo(
    say: Say,
    sparsity: Annotated[float, typer.Option(help="The fraction to prune.")] = 0.6,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep all files in this new directory.")] = None,
    device: run_option("device") = "auto",  # type: ignore[valid-type]
    seed: run_option("seed") = 0,  # type: ignore[valid-type]
) -> None:
    """Run every stage on the embedded model, offline, in about a minute: methods side by side, dense first.

    A trained model of a million parameters, calibrated on Python's help topics and measured on those it has
    never seen.

    Example: trim demo -o demo-files
    """
    from trimcli.demo.run import demo as run
    from trimcli.errors import OutputExists
    from trimcli.files.outputs import check_outputs
    from trimcli.options import fraction

    fraction("--sparsity", sparsity)
    if output is not None:
        if os.path.lexists(output):
            raise OutputExists(f"{output} exists already; name another directory.")
        check_outputs([], directories=[output])
        output.mkdir()
    with tempfile.TemporaryDirectory(prefix="trim-demo-") as folder:
        directory, shared = output or Path(folder), {"seed": seed, "device": device}
        found = run(directory, sparsity, progress=say.progress, say=lambda line: say.note(f"$ {line}"), **shared)
        say.result(lambda: asdict(found), lambda: _print(found, kept=output is not None))


def _print(result: "DemoResult", *, kept: bool) -> None:
    dense = result.rows[0].perplexity
    rows = []
    for row in result.rows:
        first = row.label == "dense"
        ratio, seconds = ("", "") if first else (f"{row.perplexity / dense:.2f}x", f"{row.seconds:.1f}")
        label = f"{row.label} *" if row.label == result.best else row.label
        rows.append((label, f"{row.perplexity:.2f}", ratio, f"{row.sparsity:.2%}", seconds))
    headers = ("method", "perplexity", "of dense", "sparsity", "seconds")
    show(rows_table(headers, rows, "Held-back help topics, embedded model"))
    show(
        f"* best: {result.best}; its directory verified; {size(result.dense_bytes)} as an ordinary directory, "
        f"{size(result.packed_bytes)} packed (embedding and head stay dense)"
    )
    if kept:
        show(f"all files are in {result.directory}")
    show(f"{result.seconds:.0f} seconds")
