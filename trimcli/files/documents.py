"""JSON documents in and out."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimcli.errors import InputError, MismatchError
from trimcli.files.atomic import MARK, atomic_file


def finite_or_none(value: Any) -> Any:
    """`value` with every NaN or infinite float in it as None: JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite_or_none(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(entry) for entry in value]
    return value


def check_schema(found: Mapping[str, Any], expected: str, path: Path) -> None:
    """Raise MismatchError unless the manifest `found` in `path` has schema `expected`."""
    schema = found.get("schema")
    if schema != expected:
        raise MismatchError(f"{path} is of schema {schema!r} where {expected!r} is needed; give the right file.")


def write_json(target: Path, document: Mapping[str, Any], *, force: bool = False) -> None:
    """Write one JSON document atomically; NaN and infinity become null."""
    with atomic_file(target, force=force) as temporary:
        text = json.dumps(finite_or_none(document), indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", newline="\n")


def read_json(path: Path, schema: str | None = None) -> dict[str, Any]:
    """Read one JSON object; with `schema`, check it. Raises InputError or MismatchError naming `path`."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; check the path.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise InputError(f"{path} is not a readable JSON file ({problem}); make it anew.") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} holds a {type(document).__name__}, not a JSON object; give the right file.")
    if schema is not None:
        check_schema(document, schema, path)
    return document


def read_mark(directory: Path) -> dict[str, Any]:
    """The `trim.json` of a model directory, empty where there is none. Raises InputError."""
    mark = directory / MARK
    return read_json(mark) if mark.is_file() else {}


def canonical_json(document: Any) -> str:
    """One spelling of a JSON value, for hashing."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"))
