"""JSON documents and texts in and out."""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trimcli.console import well_formed
from trimcli.errors import InputError, MismatchError
from trimcli.files.atomic import MARK, atomic_file

STDOUT = {"-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"}
# No document of trim's, and no config.json, comes near.
DEEPEST = 100


def is_stdout(target: Path) -> bool:
    """Whether an output is standard output."""
    return str(target) in STDOUT


def is_stream(target: Path) -> bool:
    """Whether an output is written on, not replaced: standard output or a pipe."""
    return is_stdout(target) or target.is_fifo()


def finite_or_none(value: Any) -> Any:
    """`value` as JSON can hold it: every NaN or infinite float in it None, every text well-formed."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, Mapping):
        return {str(key): finite_or_none(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(entry) for entry in value]
    return value


def check_schema(found: Mapping[str, Any], expected: str, path: Path) -> None:
    """Raise MismatchError unless the manifest `found` in `path` has schema `expected`."""
    schema = found.get("schema")
    if schema != expected:
        refuse_later(found, [expected], path)
        raise MismatchError(f"{path} is of schema {schema!r} where {expected!r} is needed; give the right file.")


def refuse_later(found: Mapping[str, Any], known: Iterable[str], path: Path) -> None:
    """Raise MismatchError if the manifest `found` in `path` is of a later version of one of the schemas `known`."""
    name, _, version = str(found.get("schema")).rpartition("/")
    for ours, _, number in (schema.rpartition("/") for schema in known):
        if name == ours and re.fullmatch("[0-9]{1,9}", version) and int(version) > int(number):
            made = f"{path} was made by a later version of trim ({name}/{version} where this one reads {ours}/{number})"
            raise MismatchError(f"{made}; update trim, or make the file anew with this one.")


def write_text(target: Path, text: str, *, force: bool = False) -> None:
    """Write a UTF-8 text: atomically, or on a stream (see `is_stream`)."""
    encoded = well_formed(text).encode()
    if is_stdout(target):
        sys.stdout.flush()
        sys.stdout.buffer.write(encoded)
        sys.stdout.buffer.flush()
    elif target.is_fifo():
        target.write_bytes(encoded)
    else:
        with atomic_file(target, force=force) as temporary:
            temporary.write_bytes(encoded)


def write_json(target: Path, document: Mapping[str, Any], *, force: bool = False) -> None:
    """Write one JSON document as `write_text` does; NaN and infinity become null."""
    write_text(target, json.dumps(finite_or_none(document), indent=1, ensure_ascii=False) + "\n", force=force)


def read_json(path: Path, schema: str | None = None) -> dict[str, Any]:
    """Read one JSON object; with `schema`, check it. Raises InputError or MismatchError naming `path`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; check the path.") from None
    except PermissionError:
        raise InputError(f"there is no permission to read {path}; change its rights.") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path} is not a readable JSON file ({problem}); make it anew.") from None
    return parse_json(text, path, schema)


def parse_json(text: str, path: Path, schema: str | None = None) -> dict[str, Any]:
    """The JSON object that `text`, of the file `path`, is. Raises InputError, MismatchError (not of `schema`).

    What JSON leaves open is refused in documents of trim's own schemas, since none has it: names that stand twice, and
    numbers that are not finite. A config.json may have them.
    """
    twice: list[str] = []
    odd: list[str] = []

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice.extend(name for name in found if names.count(name) > 1)
        return found

    def constant(name: str) -> float:
        odd.append(name)
        return float(name)

    def number(digits: str) -> float:
        return value if math.isfinite(value := float(digits)) else constant(digits)

    try:
        document = json.loads(text, object_pairs_hook=members, parse_constant=constant, parse_float=number)
    except RecursionError:
        raise InputError(f"{path} is nested too deep to be read; make it anew.") from None
    except ValueError as problem:  # no JSON, or a number of thousands of digits
        raise InputError(f"{path} is not a readable JSON file ({problem}); make it anew.") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} holds a {type(document).__name__}, not a JSON object; give the right file.")
    if _depth(document) > DEEPEST:
        raise InputError(f"{path} is nested deeper than {DEEPEST} levels; make it anew.")
    if schema is not None:
        check_schema(document, schema, path)
    if str(document.get("schema")).startswith("trim."):
        if twice:
            raise InputError(f"{path} has {twice[0]!r} twice in one object; make it anew.")
        if odd:
            raise InputError(f"{path} holds {odd[0]:.20}, which is no finite number; make it anew.")
        document = finite_or_none(document)
    return document


def _depth(document: Any) -> int:
    """How many levels of objects and lists there are."""
    depth, level = 0, [document]
    while level:
        depth += 1
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [part for parts in inner for part in parts if isinstance(part, dict | list)]
    return depth


def read_mark(directory: Path) -> dict[str, Any]:
    """The `trim.json` of a model directory, empty where there is none. Raises InputError."""
    mark = directory / MARK
    return read_json(mark) if mark.is_file() else {}


def canonical_json(document: Any) -> str:
    """One spelling of a JSON value, for hashing."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"))
