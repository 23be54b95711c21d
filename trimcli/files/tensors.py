"""Tensors in and out of safetensors files, one at a time: memory for the largest, not for the file."""

import contextlib
import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimcli.errors import InputError, MismatchError
from trimcli.files.atomic import atomic_file
from trimcli.files.documents import finite_or_none, parse_json
from trimcli.files.forms import Scalar

# What safetensors calls them. The order is the alignment of its layout: widest first, so every tensor starts aligned.
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float4_e2m1fn_x2: "F4",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
# Two values lie in one element of torch's, which safetensors counts apart.
PAIRS = torch.float4_e2m1fn_x2
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(dtype: torch.dtype) -> str:
    """How files and options call a dtype: float32."""
    return str(dtype).removeprefix("torch.")


NAMED = {dtype_name(dtype): dtype for dtype in DTYPES}
DTYPE = Scalar("a dtype", lambda value: isinstance(value, str) and value in NAMED)


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be before it exists: torch dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """What a tensor is."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, asking for one tensor at a time, on any device: the library wants all at once.

    While one is written the next is asked for, so that two are in memory. Raises OSError, and what `tensor` raises.
    """
    order = list(DTYPES)
    names = sorted(specs, key=lambda name: (order.index(specs[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        spec = specs[name]
        end = offset + spec.nbytes
        shape = [*spec.shape[:-1], 2 * spec.shape[-1]] if spec.dtype == PAIRS else list(spec.shape)
        header[name] = {"dtype": DTYPES[spec.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as handle, ThreadPoolExecutor(1) as background:
        written = background.submit(handle.write, struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            value = tensor(name)
            if TensorSpec.of(value) != specs[name]:
                raise AssertionError(f"{name} is {TensorSpec.of(value)}, promised {specs[name]}")
            data = _bytes(value) if value.numel() else b""
            written.result()
            written = background.submit(handle.write, data)
        written.result()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, hexadecimal."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """XXH3-128 of a tensor's bytes, hexadecimal: at the speed of memory, against changes but not against forgery."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory, no copy where it lies contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_manifest(path: Path, schema: str | None = None) -> dict[str, Any]:
    """The manifest in an artifact. Raises InputError (missing, damaged), MismatchError (none, not `schema`)."""
    with open_tensors(path) as handle:
        text = (handle.metadata() or {}).get("manifest")
    if text is None:
        needed = "" if schema is None else f" where {schema!r} is needed"
        raise MismatchError(f"{path} carries no trim manifest{needed}; give the right file.")
    return parse_json(text, path, schema)


def open_tensors(path: Path) -> Any:
    """Open a safetensors file lazily (mapped, CPU). Raises InputError when missing, unreadable, truncated, damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        path.open("rb").close()  # what safe_open cannot open it calls missing
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; check the path.") from None
    except PermissionError:
        raise InputError(f"there is no permission to read {path}; change its rights.") from None
    except (SafetensorError, OSError) as problem:
        raise InputError(f"{path} is not a whole safetensors file ({problem}); fetch or make it anew.") from None


def spec_of(handle: Any, name: str, path: Path) -> TensorSpec:
    """Dtype and shape of a tensor in the opened file `path`, by its header. Raises InputError where torch lacks it."""
    piece = handle.get_slice(name)
    for dtype, safe in DTYPES.items():
        if safe == piece.get_dtype():
            shape = tuple(piece.get_shape())
            return TensorSpec(dtype, (*shape[:-1], shape[-1] // 2) if dtype == PAIRS else shape)
    raise InputError(f"{path} holds {name} as {piece.get_dtype()}, which is not supported; convert the model.")


def specs_of(keys: Iterable[str], spec: Callable[[str], TensorSpec]) -> dict[str, TensorSpec]:
    """Dtypes and shapes of the tensors `keys`, but of those whose dtype torch lacks: nothing can use them."""
    found = {}
    for key in keys:
        with contextlib.suppress(InputError):
            found[key] = spec(key)
    return found


def write_artifact(
    target: Path,
    document: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    tensor: Callable[[str], Tensor],
    *,
    force: bool = False,
) -> None:
    """Write a safetensors artifact atomically: manifest `document` in the metadata, tensors streamed."""
    with atomic_file(target, force=force) as temporary:
        text = json.dumps(finite_or_none(document), ensure_ascii=False)
        write_tensors(temporary, specs, tensor, {"format": "pt", "manifest": text})


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 2 before layer 10, however many digits there are."""
    parts = re.split(r"([0-9]+)", name)
    digits = {part: part.lstrip("0") for part in parts[1::2]}
    return [(0, len(digits[part]), digits[part]) if part in digits else (1, 0, part) for part in parts]


def bit_view(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A contiguous CPU tensor's bits as integers of its width: moving them alters no sign and no payload."""
    return tensor.view(INTEGERS[tensor.dtype.itemsize]).numpy()


def nonzero(tensor: Tensor) -> Tensor:
    """`tensor != 0`, bool, for a CPU tensor of 16 to 64 bit floats: by its bits, but for the sign, which is quicker."""
    return torch.from_numpy(bit_view(tensor.contiguous()) << 1 != 0)
