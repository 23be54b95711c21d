"""`trim alloc-layers`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from trimcli.cli.options import Model, output
from trimcli.cli.output import Say, bar, rows_table, show, spread

if TYPE_CHECKING:
    from trimcli.commands.options import AllocateOptions
    from trimcli.files.ratios import LayerSparsity


def alloc_layers(
    model: Model, output: Annotated[Path, output("layer ratios file (JSON)")], options: "AllocateOptions", say: Say
) -> None:
    """Distribute a sparsity over the layers: uniform, by OWL's outliers, or by AlphaPruning's spectra.

    No forward pass. uniform and --import need no more of the model than its config.json.

    Example: trim alloc-layers Qwen/Qwen2.5-3B -o owl70.json --method owl --sparsity 0.7 --calibration calib.safetensors
    """
    from trimcli.commands.allocate import allocate

    found = allocate(model, output, options, progress=say.progress, force=say.force)
    document = {"ratios": output, "method": found.method, "target": found.target, "sparsity": found.sparsity}
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
    show(table, f"written to {output}")
