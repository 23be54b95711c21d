"""`trim prune`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimcli.cli import common
from trimcli.cli import prune_options as shared
from trimcli.cli.common import boundary

if TYPE_CHECKING:
    from trimcli.commands.prune import PruneSummary


@boundary
def prune(
    model: common.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The masks file to write.")],
    save_model: shared.SaveModel = None,
    stats_out: shared.StatsOut = None,
    no_resume: shared.NoResume = False,
    method: shared.Method = "wanda",
    calibration: shared.Calibration = None,
    ratios: shared.Ratios = None,
    sparsity: shared.Sparsity = None,
    sparsity_type: shared.SparsityType = "unstructured",
    only: shared.Only = None,
    skip: shared.Skip = None,
    numerics: common.Numerics = "exact",
    no_propagate: shared.NoPropagate = False,
    use_variant: shared.UseVariant = False,
    use_trim: shared.UseTrim = False,
    qmetric: shared.Qmetric = "cosim_flat",
    qmetric_dimwise: shared.QmetricDimwise = "cosim",
    iterations: shared.Iterations = 10,
    forbid_neg_lr: shared.ForbidNegLr = False,
    input_recalc: shared.InputRecalc = False,
    mask_score: shared.MaskScore = "obs",
    mask_update: shared.MaskUpdate = None,
    damping: shared.Damping = 0.01,
    block_size: shared.BlockSize = 128,
    gram_dtype: shared.GramDtype = "float32",
    prune_barber: shared.PruneBarber = False,
    prune_granularity: shared.PruneGranularity = "output1",
    threshold: shared.Threshold = 0.01,
    prune_metric: shared.PruneMetric = "WD",
    retain_reconstruction: shared.RetainReconstruction = False,
    dataset: shared.Dataset = None,
    nsamples: shared.Nsamples = None,
    seqlen: shared.Seqlen = None,
    tokens: shared.Tokens = None,
    alloc: shared.Alloc = None,
    lambda_: shared.Lambda = 0.08,
    hyper_m: shared.HyperM = 5.0,
    group: shared.Group = None,
    ww_metric: shared.WwMetric = "alpha_peak",
    epsilon: shared.Epsilon = 0.3,
    mapping_type: shared.MappingType = "block",
    metrics_cache: shared.MetricsCache = None,
    batch_size: shared.BatchSize = None,
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
    """Choose which weights go, one decoder layer in memory, and write the masks.

    Later layers see what the already pruned ones produce; --no-propagate uses the dense model's cached statistics
    instead. An interrupted run goes on from the last finished layer.

    Example: trim prune Qwen/Qwen2.5-3B -o m.safetensors --calibration calib.safetensors --ratios owl70.json --use-trim

    In one go: trim prune Qwen/Qwen2.5-3B -o m.safetensors --sparsity 0.7 --alloc owl --use-trim --save-model pruned
    """
    progress = common.start(quiet, as_json)
    options = shared.build(locals())
    from trimcli.cli.tables import plan_head
    from trimcli.commands.prune import prune as run

    def announce(plan):  # type: ignore[no-untyped-def]
        if not quiet:
            print(plan_head(plan), file=sys.stderr)

    summary = run(model, output, options, force=force, progress=progress, announce=announce)
    if as_json:
        common.emit_json(asdict(summary))
    elif not quiet:
        _print(summary)


def _print(summary: "PruneSummary") -> None:
    from trimcli.cli.tables import bar, rows_table

    rows = [(layer, f"{sparsity:.4f}", bar(sparsity)) for layer, sparsity in summary.layers.items()]
    columns = (("layer", "left"), ("sparsity", "right"), ("", "left"))
    common.show(rows_table(columns, rows))
    improved = summary.rows_improved
    common.facts(
        {
            "masks": f"{summary.masks} ({common.size(summary.masks.stat().st_size)})",
            "model": summary.model_directory,
            "sparsity": f"{summary.sparsity:.4%} ({summary.zeros:,} of {summary.weights:,} weights, "
            f"{summary.linears} linears)",
            "TRIM": None
            if improved is None
            else f"row sparsities beat uniform in {improved} of {summary.linears} linears",
            "resumed": f"after {summary.resumed} layers" if summary.resumed else None,
            "seconds": f"{summary.seconds:.1f}",
            "peak memory": common.memory(summary.peak_memory),
        }
    )
