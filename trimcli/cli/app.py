"""The `trim` program: every command by name. A command is made, and what it needs imported, when it is asked for."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from trimcli.cli.alloc_layers import alloc_layers
from trimcli.cli.apply_masks import apply_masks, unpack
from trimcli.cli.bench import bench
from trimcli.cli.boundary import interrupted, say, usage
from trimcli.cli.cache import cache
from trimcli.cli.calibrate import calibrate
from trimcli.cli.demo import demo
from trimcli.cli.evaluate import evaluate
from trimcli.cli.export import export
from trimcli.cli.finetune import finetune
from trimcli.cli.generate import generate
from trimcli.cli.kernels import kernels
from trimcli.cli.options import expanded
from trimcli.cli.plan import plan
from trimcli.cli.prune import prune
from trimcli.cli.report import compare, report
from trimcli.cli.sweep import sweep
from trimcli.cli.verify import verify
from trimcli.console import prepare_streams
from trimcli.errors import TrimError
from trimcli.memory import collect_rarely

STAGES, MEASURE, MORE = "Stages, each with a file", "Measure and check", "More"
OPTIONS = "trimcli.commands.options"
# A command: its topic, its function, and what its options are made of.
COMMANDS: dict[str, tuple[str, Callable[..., None], str | None]] = {
    "calibrate": (STAGES, calibrate, f"{OPTIONS}:CalibrateOptions"),
    "alloc-layers": (STAGES, alloc_layers, "trimcli.cli.groups:ALLOCATE"),
    "prune": (STAGES, prune, "trimcli.cli.groups:PRUNE"),
    "apply-masks": (STAGES, apply_masks, f"{OPTIONS}:ApplyOptions"),
    "finetune": (STAGES, finetune, "trimcli.training.options:FinetuneOptions"),
    "eval": (STAGES, evaluate, f"{OPTIONS}:EvaluateOptions"),
    "plan": (MEASURE, plan, "trimcli.cli.groups:PRUNE"),
    "verify": (MEASURE, verify, f"{OPTIONS}:VerifyOptions"),
    "report": (MEASURE, report, None),
    "compare": (MEASURE, compare, None),
    "sweep": (MORE, sweep, "trimcli.cli.groups:SWEEP"),
    "export": (MORE, export, "trimcli.kernels.options:ExportOptions"),
    "bench": (MORE, bench, "trimcli.kernels.options:BenchOptions"),
    "generate": (MORE, generate, f"{OPTIONS}:GenerateOptions"),
    "kernels": (MORE, kernels, None),
    "unpack": (MORE, unpack, None),
    "cache": (MORE, cache, None),
    "demo": (MORE, demo, None),
}
# What several ranks under torchrun share; anything else is one process's work.
SHARED = ("calibrate", "alloc-layers", "prune", "eval", "finetune")


class Command(TyperCommand):
    """A command whose --help, which takes no value, shows none."""

    def get_help_option(self, ctx: Any) -> Any:
        """As typer makes it, but for the type behind it."""
        found = super().get_help_option(ctx)
        if found is not None:
            found.metavar = ""
        return found


class Program(TyperGroup):
    """Commands made on demand, help by topic in plain text (quicker than drawing it), errors in one sentence."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Every command, in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, None where there is none."""
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            _, function, takes = COMMANDS[cmd_name]
            alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
            alone.command(cmd_name, cls=Command)(
                expanded(function, takes, alone=None if cmd_name in SHARED else cmd_name)
            )
            self.commands[cmd_name] = typer.main.get_command(alone)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer does, which proposes names of those commands that are there."""
        for name in () if args and args[0] in COMMANDS else COMMANDS:
            self.get_command(ctx, name)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands under their topics, each with its docstring's first sentence."""
        topics: dict[str, list[tuple[str, str]]] = {}
        for name, (topic, function, _) in COMMANDS.items():
            first = (function.__doc__ or "").split("\n\n")[0]
            topics.setdefault(topic, []).append((name, " ".join(first.split())))
        for topic, rows in topics.items():
            with formatter.section(topic):
                formatter.write_dl(rows)

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run, and leave with an exit status; what typer finds wrong is told in one sentence."""
        if not settings.get("standalone_mode", True):
            prepare_streams()
            return super().main(*args, **settings)
        try:
            prepare_streams()
            status = super().main(*args, **{**settings, "standalone_mode": False}) or 0
            interrupted(status)
            sys.exit(status)
        except (typer.Abort, KeyboardInterrupt):
            interrupted(130)
            sys.exit(130)
        except TrimError as problem:  # while a command is made: a package with methods that cannot be loaded
            say(str(problem))
            sys.exit(problem.exit_status)
        except typer.TyperException as problem:
            context = getattr(problem, "ctx", None)
            if type(problem).__name__ == "NoArgsIsHelpError":
                print(problem.format_message(), file=sys.stderr)
            else:
                say(usage(problem, context.command_path if context else "trim"))
            sys.exit(problem.exit_code)


app = typer.Typer(
    name="trim",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Prune large language models to extreme sparsity, and say honestly what that cost.\n\n"
    "Start with trim demo (offline, a minute), or in one go: "
    "trim prune MODEL -o masks.safetensors --sparsity 0.7 --alloc owl --use-trim --save-model DIR.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"trim {version('trimcli')}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.", metavar=""),
    ] = False,
) -> None:
    """The options before a command."""


def main() -> None:
    """Entry point of the console script."""
    collect_rarely()
    try:
        app()
    except KeyboardInterrupt:  # in the moment before a command's work or after it
        interrupted(130)
        sys.exit(130)
