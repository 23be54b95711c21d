"""`trim report` and `trim compare`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from trimcli.cli.output import Say, facts, show, size


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="results.json, ratios.json, masks, TRIM's stats and model directories of one or several runs."
        ),
    ],
    say: Say,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The report to write.")] = None,
    form: Annotated[
        Literal["html", "md"],
        typer.Option("--format", help="html: one self-contained page; md: tables for a model card."),
    ] = "html",
) -> None:
    """Tables and plots of one or several runs in one file, dense first; no network needed to read it.

    Example: trim report dense.json pruned.json owl70.json masks.safetensors -o report.html
    """
    from trimcli.report.build import build_report
    from trimcli.report.terminal import summary

    made = build_report(files, form, output, force=say.force)

    def people() -> None:
        if output is None:
            show(made.text)
        else:
            show(summary(made.gathered))
            facts({"report": f"{output} ({size(output.stat().st_size)})"})

    say.result(lambda: {"report": output, "format": form, "runs": len(made.gathered.table.rows)}, people)


def compare(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Results files of `trim eval`.")], say: Say
) -> None:
    """One table over runs, dense first, with what each figure was measured on.

    Example: trim compare dense.json wanda70.json trim70.json
    """
    from trimcli.report.compare import compare as run
    from trimcli.report.terminal import comparison

    table = run(files)
    say.result(table.document, lambda: show(comparison(table)))
