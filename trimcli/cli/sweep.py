"""`trim sweep`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimcli.cli.options import Model, OutputFile
from trimcli.cli.output import Say, rows_table, show

if TYPE_CHECKING:
    from trimcli.sweep.grid import SweepOptions
    from trimcli.sweep.run import Run, SweepPlan, SweepResult


def sweep(model: Model, options: "SweepOptions", say: Say, output: OutputFile = None) -> None:
    """Try a small grid of settings from one calibration, and print the best one's command line.

    Each is measured on samples of the calibration text that were held out: never on a test set. Masks and models
    of the runs are not kept; an interrupted sweep goes on with the first setting not yet measured.

    Example: trim sweep Qwen/Qwen2.5-3B --sparsity 0.7 --alloc owl --lambda 0.02,0.05,0.08 --trim on,off
    """
    from trimcli.sweep.run import sweep as run

    def announce(plan: "SweepPlan") -> None:
        say.note(
            f"{plan.settings} settings and the dense model: {plan.nsamples} samples calibrate, {plan.holdout} "
            f"more measure, of {plan.seqlen} tokens each; about {plan.sample_passes:,} forward passes of a sample"
        )

    found = run(model, options, output, force=say.force, progress=say.progress, announce=announce)
    say.result(lambda: found.document, lambda: _print(found, output))


def _print(result: "SweepResult", output: Path | None) -> None:
    runs = result.runs
    seen: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.values.items():
            seen.setdefault(name, set()).add(str(value))
    # What is the same wherever it applies is in the command line below; what varies, the table shows.
    varied = [name for name, found in seen.items() if len(found) > 1] or ["method"]
    columns = [(name.replace("_", "-"), "left") for name in varied]
    columns += [(name, "right") for name in ("sparsity", "perplexity", "of dense", "seconds")]
    first = ["dense", *[""] * (len(varied) - 1)]
    rows = [first + _figures(result.dense, result.dense)]
    rows += [[_word(run.values, name) for name in varied] + _figures(run, result.dense) for run in runs]
    show(
        rows_table(columns, rows),
        f"perplexity on {result.heldout} held-out samples of {result.seqlen} tokens of the calibration text, "
        "of no test set",
    )
    if result.taken_over:
        show(f"{result.taken_over} of {len(runs) + 1} taken over from an earlier sweep")
    if output is not None:
        show(f"written to {output}")
    show("\nthe best one's command line:", str(runs[0].command))


def _word(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name, "")
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _figures(run: "Run", dense: "Run") -> list[str]:
    ratio = run.perplexity / dense.perplexity
    return [f"{run.sparsity:.4f}", f"{run.perplexity:.5g}", f"{ratio:.3f}", f"{run.seconds:.1f}"]
