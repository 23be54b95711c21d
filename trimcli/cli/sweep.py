"""`trim sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING

from trimcli.cli.options import Model, OutputFile, word
from trimcli.cli.output import Say, rows_table, show

if TYPE_CHECKING:
    from trimcli.sweep.grid import SweepOptions
    from trimcli.sweep.run import SweepPlan, SweepResult


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
    axes = [name.replace("_", "-") for name in varied]
    rows = []
    for run in (result.dense, *runs):
        values = [word(run.values.get(name, "")) for name in varied]
        values[0] = "dense" if run is result.dense else values[0]
        ratio = f"{run.perplexity / result.dense.perplexity:.3f}"
        rows.append([*values, f"{run.sparsity:.4f}", f"{run.perplexity:.5g}", ratio, f"{run.seconds:.1f}"])
    samples = f"{result.heldout} held-out samples of {result.seqlen} tokens of the calibration text"
    table = rows_table([*axes, "sparsity", "perplexity", "of dense", "seconds"], rows, words=axes)
    show(table, f"perplexity on {samples}, of no test set")
    if result.taken_over:
        show(f"{result.taken_over} of {len(runs) + 1} taken over from an earlier sweep")
    if output is not None:
        show(f"written to {output}")
    show("\nthe best one's command line:", str(runs[0].command))
