"""The `trim` program: every command by name. Nothing heavy is imported until a command runs."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trimcli.cli.alloc_layers import alloc_layers
from trimcli.cli.apply_masks import apply_masks, unpack
from trimcli.cli.bench import bench
from trimcli.cli.cache import cache
from trimcli.cli.calibrate import calibrate
from trimcli.cli.demo import demo
from trimcli.cli.evaluate import evaluate
from trimcli.cli.export import export
from trimcli.cli.plan import plan
from trimcli.cli.prune import prune
from trimcli.cli.report import compare, report
from trimcli.cli.sweep import sweep
from trimcli.cli.verify import verify


class Program(TyperGroup):
    """The program's own help, in plain text by topic: drawing it with `rich` would take longer than reading it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "rich_markup_mode": None})

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands under their topics, in the order of the work."""
        topics: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.commands[name]
            topic = getattr(command, "rich_help_panel", None)
            topics.setdefault(str(topic), []).append((name, (command.help or "").split("\n\n")[0].replace("\n", " ")))
        for topic, rows in topics.items():
            with formatter.section(topic):
                formatter.write_dl(rows)


app = typer.Typer(
    name="trim",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Prune large language models to extreme sparsity, and say honestly what that cost.\n\n"
    "Start with trim demo (offline, a minute), or in one go: "
    "trim prune MODEL -o masks.safetensors --sparsity 0.7 --alloc owl --use-trim --save-model DIR.",
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
app.command("verify", rich_help_panel=MEASURE)(verify)
app.command("report", rich_help_panel=MEASURE)(report)
app.command("compare", rich_help_panel=MEASURE)(compare)
app.command("sweep", rich_help_panel=MORE)(sweep)
app.command("export", rich_help_panel=MORE)(export)
app.command("bench", rich_help_panel=MORE)(bench)
app.command("unpack", rich_help_panel=MORE)(unpack)
app.command("cache", rich_help_panel=MORE)(cache)
app.command("demo", rich_help_panel=MORE)(demo)


def main() -> None:
    """Entry point of the console script."""
    app()
