"""`trim sweep`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimcli.cli import common
from trimcli.cli import prune_options as shared
from trimcli.cli.common import boundary
from trimcli.cli.lists import some, values

if TYPE_CHECKING:
    from trimcli.sweep.run import Run, SweepPlan, SweepResult

GRID, SAMPLES = "The grid (values separated by commas)", "Samples"
SWITCH = {"on": True, "off": False}


def axis(help: str, *names: str) -> Any:
    """An option of the grid."""
    return typer.Option(*names, help=help, rich_help_panel=GRID, show_default=True)


@boundary
def sweep(
    model: common.Model,
    sparsity: Annotated[float, typer.Option(help="The fraction to prune, in [0, 1); the same in every run.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A JSON file of what was found.")] = None,
    method: Annotated[str, axis("wanda, magnitude, sparsegpt.")] = "wanda",
    alloc: Annotated[str, axis("Layer allocations: uniform, owl, alpha.")] = "uniform,owl,alpha",
    trim: Annotated[str, axis("With TRIM's row search (on), without (off).")] = "off,on",
    lambda_: Annotated[str | None, axis("OWL's lambda (default 0.08).", "--lambda")] = None,
    hyper_m: Annotated[str | None, axis("OWL's M (default 5).")] = None,
    ww_metric: Annotated[str | None, axis("Alpha's metric (default alpha_peak).")] = None,
    epsilon: Annotated[str | None, axis("Alpha's epsilon (default 0.3).")] = None,
    mapping_type: Annotated[str | None, axis("Alpha's mapping: block, layer (default block).")] = None,
    qmetric: Annotated[str | None, axis("TRIM's quality of a matrix (default cosim_flat).")] = None,
    qmetric_dimwise: Annotated[str | None, axis("TRIM's quality of a row (default cosim).")] = None,
    iterations: Annotated[str | None, axis("Iterations of TRIM's search (default 10).")] = None,
    forbid_neg_lr: shared.ForbidNegLr = False,
    input_recalc: shared.InputRecalc = False,
    dataset: Annotated[
        str,
        typer.Option(help="c4, wikitext2, ptb (their training text), a FILE or hf:NAME.", rich_help_panel=SAMPLES),
    ] = "c4",
    nsamples: Annotated[int, typer.Option(help="Calibration samples.", rich_help_panel=SAMPLES)] = 256,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens a sample, as for calibrate.", rich_help_panel=SAMPLES)
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="Samples from this file (a calibration file is one): the last ones measure, the others calibrate.",
            rich_help_panel=SAMPLES,
        ),
    ] = None,
    holdout: Annotated[
        int,
        typer.Option(help="Samples of the same text held out, to measure on.", rich_help_panel=SAMPLES),
    ] = 32,
    numerics: common.Numerics = "exact",
    no_propagate: shared.NoPropagate = False,
    metrics_cache: Annotated[Path | None, typer.Option(help="Alpha's metrics file.")] = None,
    only: shared.Only = None,
    skip: shared.Skip = None,
    batch_size: shared.BatchSize = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Measure anew what an earlier sweep has measured.")
    ] = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    seed: common.Seed = 0,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
    force: common.Force = False,
    cache_dir: common.CacheDir = None,
    trust_remote_code: common.TrustRemoteCode = False,
    revision: common.Revision = None,
) -> None:
    """Try a small grid of settings from one calibration, and print the best one's command line.

    Each is measured on samples of the calibration text that were held out: never on a test set. Masks and models
    of the runs are not kept; an interrupted sweep goes on with the first setting not yet measured.

    Example: trim sweep Qwen/Qwen2.5-3B --sparsity 0.7 --alloc owl --lambda 0.02,0.05,0.08 --trim on,off
    """
    progress = common.start(quiet, as_json)
    from trimcli.sweep.grid import SweepOptions
    from trimcli.sweep.run import sweep as run

    options = SweepOptions(
        device=device,
        dtype=dtype,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
        cache_dir=cache_dir,
        sparsity=sparsity,
        method=common.split(method),
        alloc=common.split(alloc),
        trim=values("--trim", trim, SWITCH.__getitem__),
        lambda_=some("--lambda", lambda_, float),
        hyper_m=some("--hyper-m", hyper_m, float),
        ww_metric=some("--ww-metric", ww_metric, str),
        epsilon=some("--epsilon", epsilon, float),
        mapping_type=some("--mapping-type", mapping_type, str),
        qmetric=some("--qmetric", qmetric, str),
        qmetric_dimwise=some("--qmetric-dimwise", qmetric_dimwise, str),
        iterations=some("--iterations", iterations, int),
        forbid_negative=forbid_neg_lr,
        input_recalc=input_recalc,
        propagate=not no_propagate,
        numerics=numerics,  # type: ignore[arg-type]
        dataset=dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        tokens=tokens,
        holdout=holdout,
        metrics_cache=metrics_cache,
        only=tuple(only or ()),
        skip=tuple(skip or ()),
        batch_size=batch_size,
        resume=not no_resume,
    )

    def announce(plan: "SweepPlan") -> None:
        if not quiet:
            print(
                f"{plan.settings} settings and the dense model: {plan.nsamples} samples calibrate, {plan.holdout} "
                f"more measure, of {plan.seqlen} tokens each; about {plan.sample_passes:,} forward passes of a sample",
                file=sys.stderr,
            )

    result = run(model, options, output, force=force, progress=progress, announce=announce)
    if as_json:
        common.emit_json(result.document)
    elif not quiet:
        _print(result, output)


def _print(result: "SweepResult", output: Path | None) -> None:
    from trimcli.cli.tables import rows_table

    runs = result.runs
    seen: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.values.items():
            seen.setdefault(name, set()).add(str(value))
    # What is the same wherever it applies is in the command line below; what varies, the table shows.
    varied = [name for name, found in seen.items() if len(found) > 1] or ["method"]
    columns = [(name.replace("_", "-"), "left") for name in varied]
    columns += [("sparsity", "right"), ("perplexity", "right"), ("of dense", "right"), ("seconds", "right")]
    first = ["dense", *[""] * (len(varied) - 1)]
    rows = [first + _figures(result.dense, result.dense)]
    rows += [[_word(run.values, name) for name in varied] + _figures(run, result.dense) for run in runs]
    common.show(
        rows_table(columns, rows),
        f"perplexity on {result.heldout} held-out samples of {result.seqlen} tokens of the calibration text, "
        "of no test set",
    )
    if result.taken_over:
        common.show(f"{result.taken_over} of {len(runs) + 1} taken over from an earlier sweep")
    if output is not None:
        common.show(f"written to {output}")
    common.show("\nthe best one's command line:", runs[0].command)


def _word(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return ""
    value = values[name]
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _figures(run: "Run", dense: "Run") -> list[str]:
    return [
        f"{run.sparsity:.4f}",
        f"{run.perplexity:.5g}",
        f"{run.perplexity / dense.perplexity:.3f}",
        f"{run.seconds:.1f}",
    ]
