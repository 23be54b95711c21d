"""`trim apply-masks` and `trim unpack`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from trimcli.cli import common
from trimcli.cli.common import boundary


@boundary
def apply_masks(
    model: common.Model,
    masks: Annotated[Path, typer.Argument(help="A masks file of `trim prune`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The model directory to write.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="dense: an ordinary directory with zeros in it. packed: keep bits and kept values, really smaller.",
        ),
    ] = "dense",
    max_shard_size: Annotated[
        str | None, typer.Option(help="Shard anew, such as 5GB; the model's own shards if not given.")
    ] = None,
    other_weights: Annotated[
        bool,
        typer.Option("--other-weights", help="Accept other weights of the same structure: a fine-tuned model."),
    ] = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
    force: common.Force = False,
    trust_remote_code: common.TrustRemoteCode = False,
    revision: common.Revision = None,
) -> None:
    """Write the pruned model: the weights that the masks take are zero, everything else is as it was.

    Shard in, shard out: memory for one tensor. The directory loads with transformers as any other.

    Example: trim apply-masks Qwen/Qwen2.5-3B masks.safetensors -o Qwen2.5-3B-70
    """
    progress = common.start(quiet, as_json)
    from trimcli.commands.apply import ApplyOptions
    from trimcli.commands.apply import apply_masks as run

    options = ApplyOptions(
        format=form,  # type: ignore[arg-type]
        max_shard_size=max_shard_size,
        other_weights=other_weights,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    summary = run(model, masks, output, options, force=force, progress=progress)
    if as_json:
        common.emit_json(asdict(summary))
    elif not quiet:
        share = summary.nbytes / summary.dense_bytes if summary.dense_bytes else 1.0
        common.facts(
            {
                "model": f"{summary.output} ({summary.format})",
                "sparsity": f"{summary.sparsity:.4%} of {summary.linears} linears ({summary.zeros:,} zeros)",
                "bytes": f"{common.size(summary.nbytes)}, dense {common.size(summary.dense_bytes)} ({share:.1%})",
                "note": "zeros take as much room as any weight; --format packed makes the files smaller"
                if summary.format == "dense"
                else None,
            }
        )


@boundary
def unpack(
    packed: Annotated[Path, typer.Argument(help="A packed directory of `trim apply-masks --format packed`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ordinary model directory to write.")],
    quiet: common.Quiet = False,
    as_json: common.Json = False,
    force: common.Force = False,
) -> None:
    """Turn a packed directory back into an ordinary one, bit for bit.

    Example: trim unpack Qwen2.5-3B-70-packed -o Qwen2.5-3B-70
    """
    progress = common.start(quiet, as_json)
    from trimcli.commands.unpack import unpack as run

    written = run(packed, output, force=force, progress=progress)
    if as_json:
        common.emit_json({"model": output, "nbytes": written.nbytes, "sparsity": written.document["sparsity"]})
    elif not quiet:
        common.facts(
            {
                "model": output,
                "bytes": common.size(written.nbytes),
                "sparsity": f"{written.document['sparsity']:.4%}",
            }
        )
