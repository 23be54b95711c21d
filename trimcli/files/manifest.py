"""Manifests and fingerprints: what every file that `trim` leaves says of itself, and how a reader checks it."""

import contextvars
import functools
import hashlib
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trimcli.errors import MismatchError
from trimcli.files.atomic import file_digest
from trimcli.files.documents import canonical_json, finite_or_none

ADAPTER = "trim.adapter/1"
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


@functools.cache
def installed(package: str) -> str:
    """The version of an installed package; to read and parse what it says of itself takes milliseconds."""
    return version(package)


@dataclass(frozen=True)
class ModelFingerprint:
    """Which model a file is of: SHA-256 of its config, names and shapes, and a hash of its weights, if read.

    earlier: the content by which files of earlier versions know it; None where this was read from a file.
    """

    id: str
    structure: str
    content: str | None = None
    earlier: Callable[[], str] | None = field(default=None, compare=False, repr=False)

    def document(self) -> dict[str, Any]:
        """The JSON form that manifests carry."""
        return {"id": self.id, "structure": self.structure, "content": self.content}

    def has_content(self, content: str) -> bool | None:
        """Whether its weights are those of `content`; None where two files of different versions do not tell."""
        if content == self.content or self.content is None:
            return content == self.content
        if self.earlier is not None:
            return ":" not in content and content == self.earlier()
        return None if (":" in content) != (":" in self.content) else False


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
        "trim": installed("trimcli"),
        "command": command,
        "command_line": COMMAND_LINE.get(),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
        "model": model.document() if model else None,
        "sources": {role: {"path": str(path), "sha256": file_digest(path)} for role, path in made_from.items()},
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in LIBRARIES}},
        **fields,
    }


def check_model(found: Mapping[str, Any], model: ModelFingerprint, path: Path) -> None:
    """Raise MismatchError unless the manifest `found` in `path` is of `model`; without content, of any weights."""
    theirs = _model_in(found)
    structure, content = str(theirs.get("structure")), str(theirs.get("content") or "")
    if structure != model.structure:
        pair = f"{theirs.get('id')!r} (structure {structure[:12]}), not for {model.id!r} ({model.structure[:12]})"
        raise MismatchError(f"{path} was made for the model {pair}; make it anew for this model.")
    if content and model.has_content(content) is False:
        pair = f"{theirs.get('id')!r} (content {content[:12]}), not {model.id!r} ({str(model.content)[:12]})"
        raise MismatchError(f"{path} was made for other weights of this structure: {pair}; make it anew.")


def check_masks(found: Mapping[str, Any], model: ModelFingerprint, path: Path) -> None:
    """`check_model` for masks: these weights suffice, whatever a config that was saved anew says of them."""
    content = str(_model_in(found).get("content") or "")
    if not (content and model.has_content(content)):
        check_model(found, model, path)


def _model_in(found: Mapping[str, Any]) -> Mapping[str, Any]:
    said = found.get("model")
    return said if isinstance(said, Mapping) else {}


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
