"""The `trim` program: every command by name. Nothing heavy is imported until a command runs."""

from typing import Annotated

import typer

from trimcli.cli.alloc_layers import alloc_layers
from trimcli.cli.apply_masks import apply_masks, unpack
from trimcli.cli.cache import cache
from trimcli.cli.calibrate import calibrate
from trimcli.cli.evaluate import evaluate
from trimcli.cli.plan import plan
from trimcli.cli.prune import prune

app = typer.Typer(
    name="trim",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Prune large language models to extreme sparsity, and say honestly what that cost.\n\n"
    "Start with `trim demo` (offline, a minute), or in one go: "
    "`trim prune MODEL -o masks.safetensors --sparsity 0.7 --alloc owl --use-trim --save-model DIR`.",
)

STAGES, MEASURE, MORE = "Stages, each with a file", "Measure and check", "More"


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"trim {version('trimcli')}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """The options before a command."""


app.command("calibrate", rich_help_panel=STAGES)(calibrate)
app.command("alloc-layers", rich_help_panel=STAGES)(alloc_layers)
app.command("prune", rich_help_panel=STAGES)(prune)
app.command("apply-masks", rich_help_panel=STAGES)(apply_masks)
app.command("eval", rich_help_panel=STAGES)(evaluate)
app.command("plan", rich_help_panel=MEASURE)(plan)
app.command("unpack", rich_help_panel=MORE)(unpack)
app.command("cache", rich_help_panel=MORE)(cache)


def main() -> None:
    """Entry point of the console script."""
    app()
