"""The options that `prune`, `plan` and `sweep` share, as annotations, and the option objects they make."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trimcli.commands.prune import PruneOptions

TARGET, TRIM, UPDATE, BARBER, ONE_GO = (
    "Target",
    "TRIM rows",
    "SparseGPT",
    "LLM-Barber",
    "In one go (no --calibration)",
)


def option(help: str, panel: str | None = None, *names: str) -> Any:
    """An option with its help, in a panel."""
    return typer.Option(*names, help=help, rich_help_panel=panel)


Method = Annotated[str, option("The score: wanda, magnitude or sparsegpt (which also updates the kept weights).")]
Sparsity = Annotated[float | None, option("The fraction to prune, in [0, 1).", TARGET)]
SparsityType = Annotated[
    str,
    option("unstructured, or N:M: N weights are KEPT of each M consecutive inputs (2:4, 4:8, ...).", TARGET),
]
Ratios = Annotated[Path | None, option("Layer sparsities: a file of `trim alloc-layers`.", TARGET)]
Only = Annotated[list[str] | None, option("Prune only linears whose full name matches this glob (repeatable).", TARGET)]
Skip = Annotated[list[str] | None, option("Leave linears that match this glob dense (repeatable).", TARGET)]
Calibration = Annotated[Path | None, option("A file of `trim calibrate` for this model.")]
NoPropagate = Annotated[
    bool,
    option("Use the dense model's statistics: no forward pass, one matrix in memory.", None, "--no-propagate"),
]
UseVariant = Annotated[
    bool, option("The Wanda paper's variant: rows' counts by running score sums.", None, "--use-variant")
]
UseTrim = Annotated[bool, option("Search row-wise sparsities (Beck et al. 2025).", TRIM, "--use-trim")]
Qmetric = Annotated[
    str,
    option(
        "Quality of a whole matrix's outputs that the search maximises: cosim_flat, cosim_dim, cosim_sample, mse, "
        "mse_dim, mae, snr, psnr_flat, psnr_dim, psnr_sample or pass.",
        TRIM,
    ),
]
QmetricDimwise = Annotated[str, option("Quality of each row that steers the search: cosim, mse or psnr.", TRIM)]
Iterations = Annotated[int, option("Iterations of a search.", TRIM)]
ForbidNegLr = Annotated[bool, option("Never try negative steps.", TRIM, "--forbid-neg-lr")]
InputRecalc = Annotated[
    bool, option("Collect last-token inputs anew once the linears before are pruned.", TRIM, "--input-recalc")
]
StatsOut = Annotated[Path | None, option("Write what TRIM found: FILE.json, row vectors beside it.", TRIM)]
MaskScore = Annotated[str, option("What picks the mask: obs, wanda or magnitude.", UPDATE)]
MaskUpdate = Annotated[
    str | None, option("once: fix the mask beforehand; block: choose it anew in every block.", UPDATE)
]
Damping = Annotated[float, option("Damping, relative to the mean of the Gram's diagonal.", UPDATE)]
BlockSize = Annotated[int, option("Columns updated together.", UPDATE)]
GramDtype = Annotated[str, option("Accumulate the Gram in float32 or float64.", UPDATE)]
PruneBarber = Annotated[bool, option("Rebuild the masks in a second pass (Su et al. 2024).", BARBER, "--prune-barber")]
PruneGranularity = Annotated[str, option("The unit whose weights are paired: block, layer, output1, input1.", BARBER)]
Threshold = Annotated[float, option("Share of a unit's improving pairs that swap.", BARBER)]
PruneMetric = Annotated[str, option("A weight's worth: WD, W or D.", BARBER)]
RetainReconstruction = Annotated[
    bool,
    option("Kept weights keep the sparse model's values (SparseGPT's).", BARBER, "--retain-reconstruction"),
]
NoResume = Annotated[bool, option("Start over instead of going on with an interrupted run.", None, "--no-resume")]
SaveModel = Annotated[Path | None, option("Also write the pruned model to this directory.")]
BatchSize = Annotated[int | None, option("Samples a batch; chosen if not given.")]
Dataset = Annotated[str | None, option("As for calibrate (default c4).", ONE_GO)]
Nsamples = Annotated[int | None, option("As for calibrate (default 256).", ONE_GO)]
Seqlen = Annotated[int | None, option("As for calibrate.", ONE_GO)]
Tokens = Annotated[Path | None, option("As for calibrate: exactly these samples.", ONE_GO)]
Alloc = Annotated[str | None, option("Layer allocation in one go: owl or alpha; --sparsity is the target.", ONE_GO)]
Lambda = Annotated[float, option("OWL's lambda.", ONE_GO, "--lambda")]
HyperM = Annotated[float, option("OWL's M.", ONE_GO)]
Group = Annotated[int | None, option("OWL: mixed N:M with groups of this size.", ONE_GO)]
WwMetric = Annotated[str, option("Alpha's metric.", ONE_GO)]
Epsilon = Annotated[float, option("Alpha's epsilon.", ONE_GO)]
MappingType = Annotated[str, option("Alpha's mapping: block or layer.", ONE_GO)]
MetricsCache = Annotated[Path | None, option("Alpha's metrics file.", ONE_GO)]


def build(values: dict[str, Any]) -> "PruneOptions":
    """PruneOptions from a command's parameters by name (`locals()` of the command)."""
    from trimcli.commands.allocate import AllocateOptions
    from trimcli.commands.calibrate import CalibrateOptions
    from trimcli.commands.prune import PruneOptions
    from trimcli.errors import OptionError
    from trimcli.methods.blocks.barber import BarberOptions
    from trimcli.methods.recipe import Recipe
    from trimcli.methods.rows.search import RowOptions
    from trimcli.methods.updates.obs import UpdateOptions

    run = {name: values[name] for name in ("device", "dtype", "seed", "revision", "trust_remote_code", "cache_dir")}
    numerics = values["numerics"]
    recipe = Recipe(
        method=values["method"],
        numerics=numerics,
        rows=RowOptions(
            qmetric=values["qmetric"],
            qmetric_dimwise=values["qmetric_dimwise"],
            iterations=values["iterations"],
            forbid_negative=values["forbid_neg_lr"],
            numerics=numerics,
        )
        if values["use_trim"]
        else None,
        variant=values["use_variant"],
        barber=BarberOptions(
            granularity=values["prune_granularity"],
            metric=values["prune_metric"],
            threshold=values["threshold"],
            retain_reconstruction=values["retain_reconstruction"],
            numerics=numerics,
        )
        if values["prune_barber"]
        else None,
        update=UpdateOptions(
            damping=values["damping"],
            block_size=values["block_size"],
            numerics=numerics,
            mask_score=values["mask_score"],
            mask_update=values["mask_update"],
        ),
        propagate=not values["no_propagate"],
        input_recalc=values["input_recalc"],
    )
    drawn = {name: values[name] for name in ("dataset", "nsamples", "seqlen", "tokens") if values[name] is not None}
    calibrate = None
    if drawn or values["calibration"] is None:
        calibrate = CalibrateOptions(**run, **drawn, batch_size=values["batch_size"])
        if values["calibration"] is not None:
            named = ", ".join(f"--{name}" for name in drawn)
            raise OptionError(f"--calibration with {named}: the calibration file holds its samples; drop {named}.")
    allocate = None
    if values["alloc"] is not None:
        calibration = values["calibration"] if values["alloc"] == "owl" else None
        allocate = AllocateOptions(
            **run,
            method=values["alloc"],
            sparsity=values["sparsity"],
            calibration=calibration,
            lambda_=values["lambda_"],
            hyper_m=values["hyper_m"],
            group=values["group"],
            ww_metric=values["ww_metric"],
            epsilon=values["epsilon"],
            mapping_type=values["mapping_type"],
            metrics_cache=values["metrics_cache"],
            numerics=numerics,
        )
    return PruneOptions(
        **run,
        recipe=recipe,
        sparsity=values["sparsity"],
        sparsity_type=values["sparsity_type"],
        ratios=values["ratios"],
        calibration=values["calibration"],
        calibrate=calibrate,
        allocate=allocate,
        only=tuple(values["only"] or ()),
        skip=tuple(values["skip"] or ()),
        save_model=values.get("save_model"),
        stats_out=values.get("stats_out"),
        gram_dtype=values["gram_dtype"],
        batch_size=values["batch_size"],
        resume=not values.get("no_resume", False),
    )
