"""Manifests and fingerprints: what every file that `trim` leaves says of itself, and how a reader checks it."""

import contextvars
import hashlib
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trimcli.errors import MismatchError
from trimcli.files.atomic import file_digest
from trimcli.files.documents import canonical_json, finite_or_none

CALIBRATION = "trim.calibration/1"
LAYER_SPARSITY = "trim.layer-sparsity/1"
MASKS = "trim.masks/1"
PACKED = "trim.packed/1"
PRUNED = "trim.pruned/1"
RESULTS = "trim.results/1"
ROWS = "trim.rows/1"
SEAL = "manifest_sha256"
LIBRARIES = ("torch", "transformers")

# The command line of the run, for provenance; None where the library was called. The command line sets it.
COMMAND_LINE: contextvars.ContextVar[str | None] = contextvars.ContextVar("command_line", default=None)


@dataclass(frozen=True)
class ModelFingerprint:
    """Which model a file is of: SHA-256 of its config, names and shapes, and of a sample of its weights, if read."""

    id: str
    structure: str
    content: str | None = None

    def document(self) -> dict[str, Any]:
        """The JSON form that manifests carry."""
        return asdict(self)


def manifest(
    schema: str,
    command: str,
    options: Mapping[str, Any],
    model: ModelFingerprint | None,
    sources: Mapping[str, Path | None] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """The manifest of a new file. sources: role ("masks") -> file it was made from, if any. fields: more of them."""
    made_from = {role: path for role, path in (sources or {}).items() if path}
    return {
        "schema": schema,
        "trim": version("trimcli"),
        "command": command,
        "command_line": COMMAND_LINE.get(),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
        "model": model.document() if model else None,
        "sources": {role: {"path": str(path), "sha256": file_digest(path)} for role, path in made_from.items()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        **fields,
    }


def check_model(found: Mapping[str, Any], model: ModelFingerprint, path: Path, *, structure_only: bool = False) -> None:
    """Raise MismatchError unless the manifest `found` in `path` is of `model` (structure_only: of any weights)."""
    theirs = said if isinstance(said := found.get("model"), Mapping) else {}
    structure, content = str(theirs.get("structure")), str(theirs.get("content") or "")
    if structure != model.structure:
        pair = f"{theirs.get('id')!r} (structure {structure[:12]}), not for {model.id!r} ({model.structure[:12]})"
        raise MismatchError(f"{path} was made for the model {pair}; make it anew for this model.")
    if not structure_only and content and content != model.content:
        pair = f"{theirs.get('id')!r} (content {content[:12]}), not {model.id!r} ({str(model.content)[:12]})"
        raise MismatchError(f"{path} was made for other weights of this structure: {pair}; make it anew.")


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `document` that ends in `manifest_sha256`: SHA-256 of the rest, as canonical JSON."""
    body = {key: value for key, value in finite_or_none(document).items() if key != SEAL}
    return {**body, SEAL: hashlib.sha256(canonical_json(body).encode()).hexdigest()}


def with_linears(document: Mapping[str, Any], linears: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`document` sealed with `linears`, each of which has `shape` and `zeros`, and their total `sparsity`."""
    weights = sum(math.prod(entry["shape"]) for entry in linears.values())
    zeros = sum(entry["zeros"] for entry in linears.values())
    return sealed({**document, "linears": linears, "sparsity": zeros / weights if weights else 0.0})


def is_intact(document: Mapping[str, Any]) -> bool:
    """Whether `document` still is what `sealed` returned; without the digest it is not."""
    return document.get(SEAL) == sealed(document)[SEAL]
