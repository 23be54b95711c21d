"""`trim demo`."""

import contextlib
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimcli.cli import common
from trimcli.cli.common import boundary

if TYPE_CHECKING:
    from trimcli.demo.run import DemoResult


@boundary
def demo(
    sparsity: Annotated[float, typer.Option(help="The fraction to prune.")] = 0.6,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep all files in this new directory.")] = None,
    device: common.Device = "auto",
    seed: common.Seed = 0,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Run every stage on the embedded model, offline, in about a minute: methods side by side, dense first.

    A trained model of a million parameters, calibrated on Python's help topics and measured on those it has
    never seen.

    Example: trim demo -o demo-files
    """
    progress = common.start(quiet, as_json)
    from trimcli.demo.run import demo as run
    from trimcli.errors import InputError, OutputExists
    from trimcli.options import check_sparsity

    check_sparsity(sparsity)
    with contextlib.ExitStack() as stack:
        if output is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trim-demo-")))
        else:
            directory = output
            if not directory.parent.is_dir():
                raise InputError(f"the directory {directory.parent} does not exist; create it.")
            if directory.exists():
                raise OutputExists(f"{directory} exists already; name another directory.")
            directory.mkdir()

        def say(line: str) -> None:
            if not quiet:
                print(f"$ {line}", file=sys.stderr)

        result = run(directory, sparsity, seed=seed, device=device, progress=progress, say=say)
        if as_json:
            common.emit_json(asdict(result))
        elif not quiet:
            _print(result, kept=output is not None)


def _print(result: "DemoResult", *, kept: bool) -> None:

    from trimcli.cli.tables import rows_table

    dense = result.rows[0].perplexity
    rows = [
        (
            f"[bold]{row.label}[/bold]" if row.label == result.best else row.label,
            f"{row.perplexity:.2f}",
            "" if row.label == "dense" else f"{row.perplexity / dense:.2f}x",
            f"{row.sparsity:.2%}",
            "" if row.label == "dense" else f"{row.seconds:.1f}",
        )
        for row in result.rows
    ]
    columns = [("perplexity", "right"), ("of dense", "right"), ("sparsity", "right"), ("seconds", "right")]
    common.show(rows_table((("method", "left"), *columns), rows, "Held-back help topics, embedded model"))
    common.show(
        f"best: {result.best}; its directory verified; {common.size(result.dense_bytes)} as an ordinary directory, "
        f"{common.size(result.packed_bytes)} packed (embedding and head stay dense)"
    )
    if kept:
        common.show(f"all files are in {result.directory}")
    common.show(f"{result.seconds:.0f} seconds")
