"""`trim verify`."""

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimcli.cli.output import Say, bar, rows_table, show

if TYPE_CHECKING:
    from trimcli.commands.options import VerifyOptions
    from trimcli.commands.verify import VerifyReport


def verify(
    path: Annotated[Path, typer.Argument(metavar="DIR|MASKS", help="A pruned or packed directory, or a masks file.")],
    options: "VerifyOptions",
    say: Say,
) -> None:
    """Read saved files back, tensor by tensor: sparsity per linear and layer, N:M groups, counts against the manifest.

    Exit status 1 when something does not hold.

    Example: trim verify Qwen2.5-3B-70
    """
    from trimcli.commands.verify import verify as run

    found = run(path, options, progress=say.progress)
    say.result(found.document, lambda: _print(found))
    found.check()


def _print(report: "VerifyReport") -> None:
    # The path that all names share stands in the heading, so that a row fits a terminal's line.
    parts = zip(*(linear.name.split(".")[:-1] for linear in report.linears), strict=False)
    shared = "".join(f"{part[0]}." for part in takewhile(lambda part: len(set(part)) == 1, parts))
    rows = []
    for linear in report.linears:
        asked = ":".join(map(str, linear.pattern)) if linear.pattern else ""
        if not asked and linear.target is not None:
            asked = f"{linear.target:.4f}"
        rows.append(
            (
                linear.name.removeprefix(shared),
                f"{linear.shape[0]} x {linear.shape[1]}",
                f"{linear.zeros:,}",
                f"{linear.sparsity:.4f}",
                asked,
                f"{linear.row_min:.3f} {linear.row_median:.3f} {linear.row_max:.3f}",
            )
        )
    columns = [(name, "right") for name in ("shape", "zeros", "sparsity", "asked for", "rows: min/med/max")]
    show(rows_table(((f"{shared}*" if shared else "linear", "left"), *columns), rows))
    layers = [(name, f"{sparsity:.4f}", bar(sparsity)) for name, sparsity in report.layers.items()]
    show(rows_table((("layer", "left"), ("sparsity", "right"), ("", "left")), layers))
    counts = report.row_histogram
    most = max(counts) or 1
    width = 1 / len(counts)
    histogram = [
        (f"{index * width:.2f} to {(index + 1) * width:.2f}", f"{count:,}", bar(count / most))
        for index, count in enumerate(counts)
        if count
    ]
    show(rows_table((("row sparsity", "left"), ("rows", "right"), ("", "left")), histogram))
    if report.schema is None:
        verdict = "nothing to check against: trim did not write this directory"
    else:
        verdict = "does not hold" if report.failures else "holds"
    show(
        f"{report.path}: sparsity {report.sparsity:.4%} ({report.zeros:,} zeros in {len(report.linears)} linears); "
        f"{verdict}"
    )
