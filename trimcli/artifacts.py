"""Manifests, fingerprints and atomic writes: every file that `trim` leaves or reads.

A file is written beside its target under a temporary name and renamed once it is complete and synced, so a
file that exists is whole. Tensors go out one at a time: writing a file needs memory for its largest tensor,
not for the file.
"""

import contextlib
import contextvars
import hashlib
import json
import math
import os
import platform
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimcli.errors import InputError, MismatchError, OutputExists

if TYPE_CHECKING:
    import torch

CALIBRATION = "trim.calibration/1"
LAYER_SPARSITY = "trim.layer-sparsity/1"
MASKS = "trim.masks/1"
PACKED = "trim.packed/1"
PRUNED = "trim.pruned/1"
RESULTS = "trim.results/1"
ROWS = "trim.rows/1"
MARK = "trim.json"

# The command line of the run, for provenance; None where the library was called. The command line sets it.
COMMAND_LINE: contextvars.ContextVar[str | None] = contextvars.ContextVar("command_line", default=None)

# The order is the alignment of the safetensors layout: widest first, so every tensor starts aligned.
DTYPES = {
    "float64": "F64",
    "int64": "I64",
    "float32": "F32",
    "int32": "I32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int16": "I16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint8": "U8",
    "int8": "I8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be before it exists: torch dtype and shape."""

    dtype: "torch.dtype"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ModelFingerprint:
    """Which model a file belongs to.

    structure: SHA-256 of config, module names and shapes. content: SHA-256 of dtypes and a sample of every
    tensor; None where no weights were read.
    """

    id: str
    structure: str
    content: str | None = None

    def document(self) -> dict[str, Any]:
        """The JSON form that manifests carry."""
        return {"id": self.id, "structure": self.structure, "content": self.content}


def manifest(
    schema: str,
    command: str,
    options: Mapping[str, Any],
    model: ModelFingerprint | None,
    sources: Mapping[str, Path] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """The manifest of a new file: schema, versions, options, model and the digests of its sources.

    sources: role ("calibration", "ratios", "masks") -> file it was made from. fields: what the schema adds.
    """
    from importlib.metadata import version

    return {
        "schema": schema,
        "trim": version("trimcli"),
        "command": command,
        "command_line": COMMAND_LINE.get(),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
        "model": model.document() if model else None,
        "sources": {role: {"path": str(path), "sha256": file_digest(path)} for role, path in (sources or {}).items()},
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        **fields,
    }


def check_schema(found: Mapping[str, Any], expected: str, path: Path) -> None:
    """Raise MismatchError unless the manifest `found` in `path` has schema `expected`."""
    schema = found.get("schema")
    if schema != expected:
        raise MismatchError(f"{path} is of schema {schema!r} where {expected!r} is needed; give the right file.")


def check_model(found: Mapping[str, Any], model: ModelFingerprint, path: Path, *, structure_only: bool = False) -> None:
    """Raise MismatchError unless the manifest `found` in `path` belongs to `model`.

    structure_only: accept equal structure with other weights (uniform and imported ratios, fine-tuned models).
    """
    theirs = found.get("model") or {}
    if theirs.get("structure") != model.structure:
        raise MismatchError(
            f"{path} was made for the model {theirs.get('id')!r} (structure {str(theirs.get('structure'))[:12]}), "
            f"not for {model.id!r} (structure {model.structure[:12]}); make it anew for this model."
        )
    if not structure_only and theirs.get("content") and theirs["content"] != model.content:
        raise MismatchError(
            f"{path} was made for other weights of this structure: {theirs.get('id')!r} (content "
            f"{theirs['content'][:12]}), not {model.id!r} (content {str(model.content)[:12]}); make it anew."
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise OutputExists unless `target` is free, or may be replaced.

    A file is replaced under `force`; a directory under `force` only if it is empty or carries `trim.json`.
    Raises InputError when the parent directory is missing.
    """
    if not target.parent.is_dir():
        raise InputError(f"the directory {target.parent} for the output {target.name} does not exist; create it.")
    if not target.exists():
        return
    if target.is_dir():
        if not any(target.iterdir()):
            return
        if not (target / MARK).is_file():
            raise OutputExists(f"{target} is a directory that trim did not make; name another output.")
    if not force:
        raise OutputExists(f"{target} exists already; give --force to replace it or name another output.")


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success sync and rename it, on any error remove it."""
    refuse_existing(target, force=force)
    if target.is_dir():
        raise OutputExists(f"{target} is a directory where a file is to be written; name another output.")
    temporary = _temporary(target)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `target`; on success rename it in place, on any error remove it."""
    refuse_existing(target, force=force)
    if target.is_file():
        raise OutputExists(f"{target} is a file where a directory is to be written; name another output.")
    temporary = _temporary(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
        old = None
        if target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
        temporary.rename(target)
        _sync(target.parent)
        if old:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finite_or_none(value: Any) -> Any:
    """`value` with every NaN or infinite float in it as None: JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite_or_none(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(entry) for entry in value]
    return value


def write_json(target: Path, document: Mapping[str, Any], *, force: bool = False) -> None:
    """Write one JSON document atomically; NaN and infinity become null."""
    with atomic_file(target, force=force) as temporary:
        temporary.write_text(json.dumps(finite_or_none(document), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, schema: str | None = None) -> dict[str, Any]:
    """Read one JSON object; with `schema`, check it. Raises InputError or MismatchError naming `path`."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; check the path.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise InputError(f"{path} is not a readable JSON file ({problem}); make it anew.") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} holds a {type(document).__name__}, not a JSON object; give the right file.")
    if schema is not None:
        check_schema(document, schema, path)
    return document


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensor: Callable[[str], "torch.Tensor"],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file of `specs`, asking for one tensor at a time.

    path: a temporary path from `atomic_file` or inside `atomic_directory`. tensor(name): the tensor, on any
    device, of the dtype and shape its spec promised. The safetensors library itself wants every tensor at
    once; the streamed layout is the same, byte for byte, but for the tensors' order.
    """
    order = list(DTYPES)
    names = sorted(specs, key=lambda name: (order.index(_dtype_name(specs[name])), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        spec = specs[name]
        header[name] = {
            "dtype": DTYPES[_dtype_name(spec)],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(encoded)))
        handle.write(encoded)
        for name in names:
            value = tensor(name)
            spec = specs[name]
            if value.dtype != spec.dtype or tuple(value.shape) != spec.shape:
                raise AssertionError(f"{name} is {value.dtype} {tuple(value.shape)}, promised {spec}")
            if value.numel():
                handle.write(memoryview(_bytes(value)))


def _dtype_name(spec: TensorSpec) -> str:
    return str(spec.dtype).removeprefix("torch.")


def _bytes(tensor: "torch.Tensor") -> Any:
    """The tensor's memory as a flat numpy uint8 array, no copy where it lies contiguous on the CPU."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def read_manifest(path: Path, schema: str) -> dict[str, Any]:
    """The manifest in a safetensors artifact. Raises InputError (missing, damaged) or MismatchError (schema)."""
    with open_tensors(path) as handle:
        text = (handle.metadata() or {}).get("manifest")
    if text is None:
        raise MismatchError(f"{path} carries no trim manifest where {schema!r} is needed; give the right file.")
    found: dict[str, Any] = json.loads(text)
    check_schema(found, schema, path)
    return found


def open_tensors(path: Path) -> Any:
    """Open a safetensors file lazily (mapped, CPU). Raises InputError when missing, truncated or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; check the path.") from None
    except (SafetensorError, OSError) as problem:
        raise InputError(f"{path} is not a whole safetensors file ({problem}); fetch or make it anew.") from None


def write_artifact(
    target: Path,
    document: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    tensor: Callable[[str], "torch.Tensor"],
    *,
    force: bool = False,
) -> None:
    """Write a safetensors artifact atomically: manifest `document` in the metadata, tensors streamed."""
    with atomic_file(target, force=force) as temporary:
        text = json.dumps(finite_or_none(document), ensure_ascii=False)
        write_tensors(temporary, specs, tensor, {"format": "pt", "manifest": text})
