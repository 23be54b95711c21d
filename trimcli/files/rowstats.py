"""What TRIM found, per matrix and row, as `--stats-out` writes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trimcli.files.atomic import all_or_none
from trimcli.files.documents import write_json
from trimcli.files.manifest import ROWS, SEAL
from trimcli.files.parts import Parts
from trimcli.files.tensors import write_artifact
from trimcli.methods.rows.base import RowResult

FIGURES = ("quality_uniform", "quality_best", "step", "iteration", "variance_before", "variance_after")
VECTORS = ("row_sparsity", "row_quality_before", "row_quality_after")


def row_facts(result: RowResult, target: float) -> dict[str, Any]:
    """The matrix's figures: target, qualities, step, iteration, variance over rows before and after."""
    return {"target": target, **{name: getattr(result, name) for name in FIGURES}}


def row_tensors(name: str, result: RowResult) -> dict[str, Tensor]:
    """The matrix's row vectors, float32 [D_out] each, on the CPU."""
    return {f"{name}.{vector}": getattr(result, vector).float().cpu().contiguous() for vector in VECTORS}


def stats_paths(target: Path) -> list[Path]:
    """The JSON file and the safetensors file beside it."""
    return [target, target.with_suffix(".safetensors")]


def write_row_stats(
    target: Path, document: Mapping[str, Any], facts: Mapping[str, Any], parts: Parts, layers: int, *, force: bool
) -> None:
    """Write the JSON file `target` and, beside it, the row vectors. document: the masks' manifest."""
    described = {key: value for key, value in document.items() if key != SEAL}
    described.update(schema=ROWS, linears=dict(facts))
    found = [parts.read(index) for index in range(layers)]
    homes = {name: part for part in found for name in part.names if name.rpartition(".")[2] in VECTORS}
    specs = {name: part.spec(name) for name, part in homes.items()}
    json_path, tensors_path = stats_paths(target)
    with all_or_none():
        write_artifact(tensors_path, described, specs, lambda name: homes[name].load(name), force=force)
        write_json(json_path, described, force=force)
