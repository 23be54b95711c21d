"""`trim apply-masks` and `trim unpack`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimcli.cli.options import Model, output
from trimcli.cli.output import Say, facts, size

if TYPE_CHECKING:
    from trimcli.commands.options import ApplyOptions


def apply_masks(
    model: Model,
    masks: Annotated[Path, typer.Argument(help="A masks file of `trim prune`.")],
    output: Annotated[Path, output("model directory")],
    options: "ApplyOptions",
    say: Say,
) -> None:
    """Write the pruned model: the weights that the masks take are zero, everything else is as it was.

    Shard in, shard out: memory for one tensor. The directory loads with transformers as any other.

    Example: trim apply-masks Qwen/Qwen2.5-3B masks.safetensors -o Qwen2.5-3B-70
    """
    from trimcli.commands.apply import apply_masks as run

    found = run(model, masks, output, options, force=say.force, progress=say.progress)
    share = found.nbytes / found.dense_bytes if found.dense_bytes else 1.0
    dense = "zeros take as much room as any weight; --format packed makes the files smaller"
    rows = {
        "model": f"{found.output} ({found.format})",
        "sparsity": f"{found.sparsity:.4%} of {found.linears} linears ({found.zeros:,} zeros)",
        "bytes": f"{size(found.nbytes)}, dense {size(found.dense_bytes)} ({share:.1%})",
        "note": dense if found.format == "dense" else None,
    }
    say.result(lambda: asdict(found), lambda: facts(rows))


def unpack(
    packed: Annotated[Path, typer.Argument(help="A packed directory of `trim apply-masks --format packed`.")],
    output: Annotated[Path, output("ordinary model directory")],
    say: Say,
) -> None:
    """Turn a packed directory back into an ordinary one, bit for bit.

    Example: trim unpack Qwen2.5-3B-70-packed -o Qwen2.5-3B-70
    """
    from trimcli.commands.unpack import unpack as run

    written = run(packed, output, force=say.force, progress=say.progress)
    sparsity = written.document["sparsity"]
    rows = {"model": output, "bytes": size(written.nbytes), "sparsity": f"{sparsity:.4%}"}
    say.result(lambda: {"model": output, "nbytes": written.nbytes, "sparsity": sparsity}, lambda: facts(rows))
