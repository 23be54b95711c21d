"""A manifest's own digest, so that an edited manifest is told from the one that was written."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from trimcli.artifacts import finite_or_none

FIELD = "manifest_sha256"


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `document` that ends in `manifest_sha256`: SHA-256 of the rest, as canonical JSON."""
    body = {key: value for key, value in finite_or_none(document).items() if key != FIELD}
    return {**body, FIELD: _digest(body)}


def is_intact(document: Mapping[str, Any]) -> bool:
    """Whether `document` still is what `sealed` returned; without the digest it is not."""
    return document.get(FIELD) == _digest({key: value for key, value in document.items() if key != FIELD})


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
