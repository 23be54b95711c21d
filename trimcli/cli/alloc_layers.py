"""`trim alloc-layers`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from trimcli.cli.options import Model, output
from trimcli.cli.output import Say, bar, rows_table, show, spread
from trimcli.cli.plan import announcing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.table import Table

    from trimcli.commands.options import AllocateOptions
    from trimcli.files.ratios import LayerSparsity


def alloc_layers(
    model: Model, output: Annotated[Path, output("layer ratios file (JSON)")], options: "AllocateOptions", say: Say
) -> None:
    """Distribute a sparsity over the layers: uniform, by a rule such as OWL's, or by trial.

    No rule is best everywhere: auto tries the cheap ones on calibration samples and keeps the one whose predictions
    stay closest to the dense model's; search goes on from there. Trials prune by wanda on dense statistics whatever
    the prune to come does, so they rank allocations; one decoder layer is in memory. The other methods make no forward
    pass. uniform, depth and --import need no more of the model than its config.json.

    Example: trim alloc-layers Qwen/Qwen2.5-3B -o a70.json --method auto --sparsity 0.7 --calibration calib.safetensors
    """
    from trimcli.commands.allocate import allocate

    found = allocate(model, output, options, progress=say.progress, force=say.force, announce=announcing(say))
    document = {
        "ratios": output,
        "method": found.method,
        "target": found.target,
        "parameters": found.parameters,
        "sparsity": found.sparsity,
    }
    say.result(lambda: document, lambda: _print(found, output))


def _print(found: "LayerSparsity", output: Path) -> None:
    """By decoder layer, with the metric behind it."""
    from trimcli.files.names import grouped, layer_of

    rows = []
    for layer, names in grouped(found.sparsity, layer_of).items():
        values = [found.sparsity[name] for name in names]
        metric = [value for name in names if (value := found.metric.get(name)) is not None]
        mean = f"{sum(metric) / len(metric):.4g}" if metric else ""
        rows.append((layer, mean, spread(values), bar(sum(values) / len(values))))
    table = rows_table(("layer", "metric", "sparsity", ""), rows, f"{found.method}, target {found.target:.4g}")
    show(table, *_tried(found.parameters), f"written to {output}")


def _tried(parameters: "Mapping[str, Any]") -> "Iterator[Table]":
    """What trials found, where there were any."""
    titles = {"losses": "nats a token from the dense model", "heldout": "the same on held-out samples"}
    for field, title in titles.items():
        if field in parameters:
            kept = parameters.get("chosen") or parameters.get("kept")
            rows = [(name, f"{loss:.4f}", "kept" * (name == kept)) for name, loss in parameters[field].items()]
            yield rows_table(("tried", "loss", ""), rows, title)
