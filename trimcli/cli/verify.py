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
        target = "" if linear.target is None else f"{linear.target:.4f}"
        asked = ":".join(map(str, linear.pattern)) if linear.pattern else target
        name, shape = linear.name.removeprefix(shared), f"{linear.shape[0]} x {linear.shape[1]}"
        within = f"{linear.row_min:.3f} {linear.row_median:.3f} {linear.row_max:.3f}"
        rows.append((name, shape, f"{linear.zeros:,}", f"{linear.sparsity:.4f}", asked, within))
    headers = ("shape", "zeros", "sparsity", "asked for", "rows: min/med/max")
    show(rows_table((f"{shared}*" if shared else "linear", *headers), rows))
    layers = [(name, f"{sparsity:.4f}", bar(sparsity)) for name, sparsity in report.layers.items()]
    show(rows_table(("layer", "sparsity", ""), layers))
    counts = report.row_histogram
    most, width = max(counts) or 1, 1 / len(counts)
    histogram = []
    for index, count in enumerate(counts):
        if count:
            span = f"{index * width:.2f} to {(index + 1) * width:.2f}"
            histogram.append((span, f"{count:,}", bar(count / most)))
    show(rows_table(("row sparsity", "rows", ""), histogram))
    verdict = "does not hold" if report.failures else "holds"
    if report.schema is None:
        verdict = "nothing to check against: trim did not write this directory"
    zeros = f"{report.zeros:,} zeros in {len(report.linears)} linears"
    show(f"{report.path}: sparsity {report.sparsity:.4%} ({zeros}); {verdict}")
