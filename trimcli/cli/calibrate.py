"""`trim calibrate`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from trimcli.cli import common
from trimcli.cli.common import boundary


@boundary
def calibrate(
    model: common.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The calibration file to write.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="c4, wikitext2, ptb, a FILE (.txt, .jsonl, .json.gz, .parquet) or hf:NAME with a text column."
        ),
    ] = "c4",
    nsamples: Annotated[int, typer.Option(help="Calibration samples.")] = 256,
    seqlen: Annotated[
        int | None,
        typer.Option(help="Tokens a sample; the smaller of 2048 and the model's positions if not given."),
    ] = None,
    stats: Annotated[
        str, typer.Option(help="What to keep: norms (wanda, OWL) and inputs (TRIM without propagation).")
    ] = "norms,inputs",
    batch_size: Annotated[int | None, typer.Option(help="Samples a batch; chosen if not given.")] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="A safetensors file with an integer tensor `tokens` [nsamples, seqlen]: exactly these samples."
        ),
    ] = None,
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
    """Gather tokens, activation norms and TRIM's inputs from the dense model.

    One decoder layer is in memory at a time. The file serves every later prune and allocation of this model.
    An interrupted run goes on from the last finished layer.

    Example: trim calibrate Qwen/Qwen2.5-3B -o calib.safetensors --dataset c4 --nsamples 256
    """
    progress = common.start(quiet, as_json)
    from trimcli.commands.calibrate import CalibrateOptions
    from trimcli.commands.calibrate import calibrate as run

    options = CalibrateOptions(
        device=device,
        dtype=dtype,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
        cache_dir=cache_dir,
        dataset=dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        stats=common.split(stats),
        batch_size=batch_size,
        tokens=tokens,
    )
    summary = run(model, output, options, force=force, progress=progress)
    if as_json:
        common.emit_json(asdict(summary))
    elif not quiet:
        common.facts(
            {
                "calibration": f"{summary.path} ({common.size(summary.path.stat().st_size)})",
                "samples": f"{summary.nsamples} of {summary.seqlen} tokens",
                "statistics": f"{', '.join(summary.stats)} of {summary.linears} linears",
                "seconds": f"{summary.seconds:.1f}",
                "peak memory": common.memory(summary.peak_memory),
            }
        )
