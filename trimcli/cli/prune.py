"""`trim prune`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from trimcli.cli.options import Model, output
from trimcli.cli.output import Say, bar, facts, memory, rows_table, show, size
from trimcli.cli.plan import head

if TYPE_CHECKING:
    from trimcli.commands.options import PruneOptions
    from trimcli.commands.prune import PruneSummary


def prune(
    model: Model,
    options: "PruneOptions",
    say: Say,
    output: Annotated[Path | None, output("masks file (default, with --save-model DIR: DIR.masks.safetensors)")] = None,
) -> None:
    """Choose which weights go, one decoder layer in memory, and write the masks.

    Later layers see what the already pruned ones produce; --no-propagate uses the dense model's cached statistics
    instead. An interrupted run goes on from the last finished layer.

    Example: trim prune Qwen/Qwen2.5-3B -o m.safetensors --calibration calib.safetensors --ratios owl70.json --use-trim

    In one go: trim prune Qwen/Qwen2.5-3B --sparsity 0.7 --preset best --save-model pruned
    """
    from trimcli.commands.prune import prune as run
    from trimcli.errors import OptionError

    if output is None:
        if options.save_model is None:
            raise OptionError("no output was given; give -o FILE for the masks, --save-model DIR, or both.")
        output = Path(f"{options.save_model}.masks.safetensors")
    found = run(
        model, output, options, force=say.force, progress=say.progress, announce=lambda plan: say.note(head(plan))
    )
    say.result(lambda: asdict(found), lambda: _print(found))


def _print(found: "PruneSummary") -> None:
    rows = [(layer, f"{sparsity:.4f}", bar(sparsity)) for layer, sparsity in found.layers.items()]
    show(rows_table(("layer", "sparsity", ""), rows))
    zeros = f"{found.zeros:,} of {found.weights:,} weights, {found.linears} linears"
    stood = [f"{step} stands in {some} of {all_} linears" for step, (some, all_) in found.heldout.items()]
    stood += [f"{step} betters {some} of {all_} layers" for step, (some, all_) in found.layers_bettered.items()]
    improved = f"row sparsities beat uniform in {found.rows_improved} of {found.linears} linears"
    facts(
        {
            "masks": f"{found.masks} ({size(found.masks.stat().st_size)})",
            "model": found.model_directory,
            "sparsity": f"{found.sparsity:.4%} ({zeros})",
            "TRIM": None if found.rows_improved is None else improved,
            "held out": "; ".join(stood) or None,
            "resumed": f"after {found.resumed} layers" if found.resumed else None,
            "seconds": f"{found.seconds:.1f}",
            "peak memory": memory(found.peak_memory),
        }
    )
