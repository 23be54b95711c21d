"""`trim report` and `trim compare`."""

from pathlib import Path
from typing import Annotated

import typer

from trimcli.cli import common
from trimcli.cli.common import boundary


@boundary
def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="results.json, ratios.json, masks, TRIM's stats and model directories of one or several runs."
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The report to write.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="html: one self-contained page; md: tables for a model card.")
    ] = "html",
    quiet: common.Quiet = False,
    as_json: common.Json = False,
    force: common.Force = False,
) -> None:
    """Tables and plots of one or several runs in one file, dense first; no network needed to read it.

    Example: trim report dense.json pruned.json owl70.json masks.safetensors -o report.html
    """
    common.start(quiet, as_json)
    from trimcli.report import build_report

    made = build_report(files, form, output, force=force)
    if as_json:
        common.emit_json({"report": output, "format": form, "runs": len(made.table.rows)})
    elif not quiet:
        if output is None:
            print(made.text)
        else:
            common.show(made.summary())
            common.facts({"report": f"{output} ({common.size(output.stat().st_size)})"})


@boundary
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Results files of `trim eval`.")],
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """One table over runs, dense first, with what each figure was measured on.

    Example: trim compare dense.json wanda70.json trim70.json
    """
    common.start(quiet, as_json)
    from trimcli.report.compare import compare as run
    from trimcli.report.compare import render

    table = run(files)
    if as_json:
        common.emit_json(table.document())
    elif not quiet:
        common.show(render(table))
