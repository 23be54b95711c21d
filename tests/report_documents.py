"""Small documents of every kind that a report reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from trimcli.files.atomic import MARK
from trimcli.files.documents import write_json
from trimcli.files.manifest import (
    CALIBRATION,
    LAYER_SPARSITY,
    MASKS,
    PRUNED,
    RESULTS,
    ROWS,
    ModelFingerprint,
    manifest,
    sealed,
)
from trimcli.files.masks import write_masks
from trimcli.files.tensors import TensorSpec, write_artifact

MODEL = ModelFingerprint("org/tiny", "structure-of-tiny", "content-of-tiny")
SHAPES = {
    f"model.layers.{layer}.{kind}": shape
    for layer in range(2)
    for kind, shape in (("self_attn.q_proj", (6, 10)), ("mlp.down_proj", (4, 20)))
}
RECIPE: dict[str, Any] = {"method": "wanda", "variant": False, "rows": None, "barber": None}


def pruning(**fields: Any) -> dict[str, Any]:
    """The manifest of masks, as results carry it. fields: of the options, `recipe` merged into the usual one."""
    recipe = {**RECIPE, **fields.pop("recipe", {})}
    options = {"recipe": recipe, "sparsity_type": "unstructured", "allocate": None, **fields}
    return {"options": options, "command_line": "trim prune org/tiny -o masks.safetensors"}


def perplexity(value: float | None, **fields: Any) -> dict[str, Any]:
    return {
        "dataset": "data/wiki.txt", "value": value, "seqlen": 128, "windows": 1000, "tokens": 128_017,
        "dtype": "float32", **fields,
    }  # fmt: skip


def task(acc: float, **fields: Any) -> dict[str, Any]:
    return {
        "acc": acc, "acc_stderr": 0.01, "n_shot": 0, "limit": None, "version": 1.0, "samples": 50, "documents": 50,
        **fields,
    }  # fmt: skip


def results(path: Path, sparsity: float | None = 0.0, **fields: Any) -> Path:
    """A results file; a pruned one unless `sparsity` is 0."""
    document = {
        "label": path.stem,
        "perplexity": [perplexity(20.0 + 100 * (sparsity or 0))],
        "tasks": {"quiz": task(0.5, acc_norm=0.6, acc_norm_stderr=None)},
        "mean_acc_seven": None,
        "sparsity": None if sparsity is None else {"total": sparsity, "linears": dict.fromkeys(SHAPES, sparsity)},
        "pruning": pruning() if sparsity else None,
        "seconds": 1.5,
        "peak_memory": {"anonymous": 2**30},
        **fields,
    }
    write_json(path, manifest(RESULTS, "eval", {"seqlen": 128}, MODEL, **document), force=True)
    return path


def ratios(path: Path, method: str = "owl", **fields: Any) -> Path:
    layers = {name: int(name.split(".")[2]) for name in SHAPES}
    document = {
        "method": method,
        "parameters": {"hyper_m": 5.0} if method == "owl" else {"ww_metric": "alpha_peak"},
        "target": 0.5,
        "sparsity": {name: 0.4 + 0.2 * layer for name, layer in layers.items()},
        "metric": {name: 0.9 - 0.3 * layer for name, layer in layers.items()},
        **fields,
    }
    write_json(path, manifest(LAYER_SPARSITY, "alloc-layers", {"method": method}, MODEL, **document), force=True)
    return path


def row_statistics(path: Path, *, vectors: bool = True, **fields: Any) -> Path:
    """TRIM's statistics: layer 0 gains, layer 1 does not."""
    linears = {
        name: {
            "target": 0.5, "quality_uniform": 0.9, "quality_best": 0.95 if ".0." in name else 0.9,
            "step": 0.02 if ".0." in name else 0.0, "iteration": 3, "variance_before": 0.1, "variance_after": 0.05,
        }
        for name in SHAPES
    }  # fmt: skip
    document = manifest(ROWS, "prune", pruning()["options"], MODEL, **{"linears": linears, "sparsity": 0.5, **fields})
    write_json(path, document, force=True)
    if vectors:
        rng = np.random.default_rng(0)
        vectors_of = {f"{n}.row_sparsity": rng.uniform(0.3, 0.7, shape[0]).astype("f4") for n, shape in SHAPES.items()}
        save_file(vectors_of, path.with_suffix(".safetensors"), {"manifest": json.dumps(document)})
    return path


def mask_keeps(sparsity: float = 0.5, *, uneven: bool = True) -> dict[str, torch.Tensor]:
    """bool [D_out, D_in] by linear; uneven: rows lose different numbers of weights."""
    keeps = {}
    for name, (d_out, d_in) in SHAPES.items():
        order = torch.arange(d_in).expand(d_out, d_in)
        counts = torch.arange(d_out) if uneven else torch.full((d_out,), int(sparsity * d_in))
        keeps[name] = order >= counts[:, None]
    return keeps


def masks(path: Path, *, uneven: bool = True) -> Path:
    keeps = mask_keeps(uneven=uneven)
    document = manifest(MASKS, "prune", pruning()["options"], MODEL, linears={})
    write_masks(path, document, SHAPES, lambda name: keeps[name], force=True)
    return path


def model_directory(path: Path) -> Path:
    path.mkdir()
    linears = {name: {"shape": list(shape), "zeros": shape[0]} for name, shape in SHAPES.items()}
    document = manifest(
        PRUNED,
        "apply-masks",
        {},
        MODEL,
        linears=linears,
        sparsity=0.07,
        commands=["trim prune a", "trim apply-masks b"],
    )
    write_json(path / MARK, sealed(document))
    return path


def calibration(path: Path) -> Path:
    tokens = torch.zeros(2, 3, dtype=torch.int32)
    specs = {"tokens": TensorSpec(tokens.dtype, (2, 3))}
    write_artifact(path, manifest(CALIBRATION, "calibrate", {}, MODEL), specs, lambda _: tokens)
    return path


def one_of_each(folder: Path) -> list[Path]:
    return [
        results(folder / "pruned.json", 0.5),
        results(folder / "dense.json"),
        ratios(folder / "ratios.json"),
        row_statistics(folder / "stats.json"),
        masks(folder / "masks.safetensors"),
        model_directory(folder / "model"),
        calibration(folder / "calibration.safetensors"),
    ]
