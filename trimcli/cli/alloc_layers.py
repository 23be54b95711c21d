"""`trim alloc-layers`."""

from pathlib import Path
from typing import Annotated

import typer

from trimcli.cli import common
from trimcli.cli.common import boundary


@boundary
def alloc_layers(
    model: common.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The layer ratios file (JSON) to write.")],
    method: Annotated[str, typer.Option(help="uniform, owl (Yin et al. 2024) or alpha (Lu et al. 2024).")] = "uniform",
    sparsity: Annotated[float | None, typer.Option(help="Target: the fraction of weights to prune, in [0, 1).")] = None,
    calibration: Annotated[Path | None, typer.Option(help="OWL: a file of `trim calibrate`.")] = None,
    lambda_: Annotated[
        float,
        typer.Option("--lambda", help="OWL: how far a layer may lie from the target (of N when mixed N:M)."),
    ] = 0.08,
    hyper_m: Annotated[float, typer.Option(help="OWL: a score is an outlier above this many times the mean.")] = 5.0,
    group: Annotated[
        int | None,
        typer.Option(help="OWL: mixed N:M patterns with groups of this many inputs; N is what is kept."),
    ] = None,
    ww_metric: Annotated[
        str, typer.Option(help="Alpha: alpha_peak, alpha_mid, or one of weightwatcher's ten.")
    ] = "alpha_peak",
    epsilon: Annotated[float, typer.Option(help="Alpha: the spread of the layers' shares.")] = 0.3,
    mapping_type: Annotated[
        str,
        typer.Option(help="Alpha: block gives a decoder layer's linears their mean, layer leaves them apart."),
    ] = "block",
    metrics_cache: Annotated[
        Path | None, typer.Option(help="Alpha: a JSON file of metrics, read and extended.")
    ] = None,
    import_file: Annotated[
        Path | None,
        typer.Option("--import", help="A published tool's .npy: OWL's keep ratios or Alpha's metrics."),
    ] = None,
    numerics: common.Numerics = "exact",
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
    """Distribute a sparsity over the layers: uniform, by OWL's outliers, or by AlphaPruning's spectra.

    No forward pass. uniform and --import need no more of the model than its config.json.

    Example: trim alloc-layers Qwen/Qwen2.5-3B -o owl70.json --method owl --sparsity 0.7 --calibration calib.safetensors
    """
    progress = common.start(quiet, as_json)
    from trimcli.commands.allocate import AllocateOptions, allocate

    options = AllocateOptions(
        device=device,
        dtype=dtype,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
        cache_dir=cache_dir,
        method=method,
        sparsity=sparsity,
        calibration=calibration,
        lambda_=lambda_,
        hyper_m=hyper_m,
        group=group,
        ww_metric=ww_metric,
        epsilon=epsilon,
        mapping_type=mapping_type,
        metrics_cache=metrics_cache,
        numerics=numerics,  # type: ignore[arg-type]
        import_file=import_file,
    )
    found = allocate(model, output, options, progress=progress, force=force)
    if as_json:
        common.emit_json({"ratios": output, "method": found.method, "target": found.target, "sparsity": found.sparsity})
    elif not quiet:
        from trimcli.cli.tables import print_allocation

        print_allocation(found, output)
