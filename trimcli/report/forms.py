"""What a report needs the fields of each kind of file to be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimcli.files.forms import (
    ANY,
    COUNT,
    MODEL,
    NUMBER,
    OBJECT,
    SCORE,
    SHARE,
    SIZE,
    TEXT,
    TRAINING,
    Each,
    Must,
    check_form,
)
from trimcli.files.manifest import ADAPTER, CALIBRATION, LAYER_SPARSITY, MASKS, PACKED, PRUNED, RESULTS, ROWS

# What a report is made of, and what that is called.
KINDS = {
    ADAPTER: "adapter",
    CALIBRATION: "calibration",
    LAYER_SPARSITY: "layer ratios",
    MASKS: "masks",
    PACKED: "packed model",
    PRUNED: "pruned model",
    RESULTS: "results",
    ROWS: "row statistics",
}


def _pruning(_: Any) -> dict[str, Any]:
    """Of a manifest inside another: it may have one inside itself."""
    return ORIGIN


ORIGIN: dict[str, Any] = {
    "trim": TEXT,
    "command_line": TEXT,
    "commands": [Must(TEXT)],
    "model": MODEL,
    "sources": Each(Must({"path": Must(TEXT), "sha256": Must(TEXT)})),
    "options": {"recipe": OBJECT, "sparsity_type": TEXT},
    "versions": Each(TEXT),
    "allocation": {"method": TEXT},
    "pruning": _pruning,
    "training": TRAINING,
    "lm_eval": {"version": TEXT},
    "device": TEXT,
    "compute_dtype": TEXT,
    "seconds": NUMBER,
    "peak_memory": Each(Must(NUMBER)),
    "remarks": [ANY],
}


def _task(entry: Mapping[str, Any]) -> dict[str, Any]:
    errors = [name for name in entry if name.endswith("_stderr")]
    metrics = {name: NUMBER for error in errors for name in (error, error.removesuffix("_stderr"))}
    return {**metrics, "n_shot": COUNT, "samples": Must(COUNT), "documents": Must(COUNT), "limit": NUMBER}


PERPLEXITY = {
    "dataset": Must(TEXT),
    "value": NUMBER,
    "seqlen": Must(COUNT),
    "windows": Must(COUNT),
    "tokens": Must(COUNT),
    "dtype": Must(TEXT),
}
ACCURACY = {"dataset": Must(TEXT), "top1": Must(SHARE), "top5": Must(SHARE), "images": Must(COUNT), "dtype": Must(TEXT)}
LINEARS = Each(Must({"shape": Must((Must(SIZE), Must(SIZE))), "zeros": Must(COUNT)}))
FORMS: dict[str, dict[str, Any]] = {
    ADAPTER: {"training": Must(TRAINING)},
    CALIBRATION: {},
    RESULTS: {
        "perplexity": [Must(PERPLEXITY)],
        "images": [Must(ACCURACY)],
        "tasks": Each(Must(_task)),
        "mean_acc_seven": NUMBER,
        "sparsity": {"total": SHARE, "linears": Each(Must(SHARE))},
    },
    LAYER_SPARSITY: {
        "method": Must(TEXT),
        "target": Must(SHARE),
        "sparsity": Must(Each(Must(SHARE))),
        "metric": Each(SCORE),
        "parameters": {"hyper_m": NUMBER},
    },
    ROWS: {"linears": Must(Each(Must({"quality_uniform": SCORE, "quality_best": SCORE, "step": SCORE})))},
    **{schema: {"linears": Must(LINEARS), "sparsity": Must(SHARE)} for schema in (MASKS, PRUNED, PACKED)},
}


def check_document(document: Mapping[str, Any], schema: str, path: Path) -> None:
    """Raise InputError unless a document of `schema`, read from `path`, is what a report takes it for."""
    check_form(document, {**ORIGIN, **FORMS[schema]}, path, KINDS[schema])
