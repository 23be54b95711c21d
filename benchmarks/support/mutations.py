"""Ways to damage a file: its bytes, its JSON, the header and manifest of safetensors, with or without a new seal."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

from trimcli.files.manifest import SEAL, sealed

DEEP: Any = None
for _ in range(60):
    DEEP = [DEEP]
# What may stand in the place of any value.
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 2**20, 2**31, 2**53 + 1, 2**63, 10**30, 0.5, -0.5, 1.0, 1e-300, 1e308,
    float("nan"), float("inf"), "", "x", ".", "..", "../../etc/passwd", "/etc/passwd", "C:\\x", "a/b", "\0", "\ud800",
    "[bold red]x[/bold red][/]", "\x1b[31mred\x1b]0;title\x07", "\u202egnp.exe", "<script>alert(1)</script>",
    "9" * 5000,
    "float32", "Tensor", "load", "cuda", [], {}, [1], [[]], [2, 4], [4, 2], [0, 0], [-1, 4], {"a": 1}, [None] * 3, DEEP,
]  # fmt: skip
# What may follow a document's schema.
LATER = "/7"


def mutated(data: bytes, name: str, rng: random.Random) -> bytes:
    """The file `name`, whose bytes are `data`, damaged once to three times."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = _once(data, name, rng)
    return data


def _once(data: bytes, name: str, rng: random.Random) -> bytes:
    structured: list[Callable[[bytes, random.Random], bytes]] = []
    if name.endswith(".json"):
        structured = [_json, _json, _json, _text]
    elif not name.endswith((".bin", ".npy", ".npz", ".gz")):
        structured = [_header, _header, _manifest, _payload]
    if structured and rng.random() < 0.8:
        try:
            return rng.choice(structured)(data, rng)
        except (ValueError, KeyError, TypeError, struct.error, IndexError, RecursionError, AttributeError):
            pass  # damaged before
    return _bytes(data, rng)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, or a piece cut, put in, doubled, or set to one byte."""
    if not data:
        return bytes([rng.randrange(256)])
    at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 200))
    size = rng.choice((1, 2, 8, 64, 1000))
    how = rng.randrange(6)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + data[at + size :]
    if how == 2:
        return data[:at] + bytes(rng.randrange(256) for _ in range(size)) + data[at:]
    if how == 3:
        return data[:at] + data[at : at + size] + data[at:]
    if how == 4:
        return data[:at] + bytes([rng.choice((0, 255))]) * size + data[at + size :]
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found = []
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(pairs):
        found.append((document, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


def damage(document: Any, rng: random.Random) -> None:
    """One value of a JSON document replaced, removed, renamed, moved, or doubled in its list."""
    # First on how high a level, so that long lists do not draw everything.
    levels = [(document, key) for key in (document if isinstance(document, dict) else range(len(document)))]
    spots = levels if rng.random() < 0.4 else places(document)
    if not spots:
        return
    container, key = rng.choice(spots)
    how = rng.randrange(8)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[rng.choice(["", "x", "../x", "__class__", "\x1b[31m", str(key) + "x"])] = container.pop(key)
    elif how == 2:
        other, there = rng.choice(spots)
        container[key], other[there] = other[there], container[key]
    elif how == 3 and isinstance(container, list):
        container.append(container[key])
    elif how in (4, 5) and isinstance(container[key], int | float):
        value = container[key]
        container[key] = rng.choice(
            (-value, value + 1, value * 2, value * 10**3, value * 10**6, value * 10**9, str(value))
        )
    elif how == 4 and key == "schema":
        container[key] = str(container[key]).rpartition("/")[0] + LATER
    else:
        container[key] = rng.choice(VALUES)


def _resealed(document: Any, rng: random.Random) -> Any:
    return sealed(document) if SEAL in document and rng.random() < 0.7 else document


def _dumped(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _json(data: bytes, rng: random.Random) -> bytes:
    document = json.loads(data)
    damage(document, rng)
    return _dumped(_resealed(document, rng))


def _text(data: bytes, rng: random.Random) -> bytes:
    """What no JSON value gives: names twice, constants, depth, other encodings."""
    text = data.decode()
    how = rng.randrange(6)
    at = rng.choice([index for index, one in enumerate(text) if one in "{,:"])
    if how == 0:
        return text.replace("{", '{"schema": 1, "schema": "trim.masks/1", ', 1).encode()
    if how == 1:
        return (
            text[: at + 1] + rng.choice(("NaN,", "-Infinity,", "1e999,", "9" * 5000 + ",")) + text[at + 1 :]
        ).encode()
    if how == 2:
        return (text[: at + 1] + "[" * rng.choice((50, 120, 5000, 200_000))).encode()
    if how == 3:
        depth = rng.choice((50, 99, 120, 900))
        return text.replace("{", '{"deep": ' + "[" * depth + "]" * depth + ", ", 1).encode()
    if how == 4:
        return text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")))
    return text.replace("{", "{" + " " * 10**6, 1).encode()


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, payload: bytes, length: int | None = None) -> bytes:
    """A safetensors file. length: what it says its header has."""
    encoded = _dumped(header)
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + payload


def _header(data: bytes, rng: random.Random) -> bytes:
    """A tensor that lies of its length, overlaps, or has another dtype, shape or name."""
    header, payload = split(data)
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    how = rng.randrange(9)
    if how == 0:
        entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
    elif how == 1:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(
            (0, -1, 1, 8, len(payload), len(payload) + 8, 10**10, 2**63)
        )
    elif how == 2:
        entry["shape"] = rng.choice(
            ([], [0], [10**10], [10**5, 10**5], [2**32, 2**32], [2**63], entry["shape"][::-1], [*entry["shape"], 1])
        )
    elif how == 3:
        entry["dtype"] = rng.choice(
            ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X")
        )
    elif how == 4:
        one, other = rng.choice(names), rng.choice(names)
        header[one], header[other] = header[other], header[one]
    elif how == 5:
        name = rng.choice(names)
        header[rng.choice(["", "x", "../x", "\x1b[31m", "[bold]", name + ".x", "9" * 5000])] = header.pop(name)
    elif how == 6:
        return joined(header, payload, rng.choice((0, 1, 8, len(data), 10**8, 10**10, 2**63, 2**64 - 1)))
    elif how == 7:
        size = len(payload)
        payload += bytes(64)
        header["extra"] = {"dtype": "F32", "shape": [16], "data_offsets": [size, size + 64]}
    else:
        damage(header, rng)
    return joined(header, payload)


def _manifest(data: bytes, rng: random.Random) -> bytes:
    """What the metadata say of the file."""
    header, payload = split(data)
    metadata = header["__metadata__"]
    name = "manifest" if "manifest" in metadata else "facts"
    if rng.random() < 0.15:
        metadata[name] = _text(metadata[name].encode(), rng).decode("latin-1")
        return joined(header, payload)
    document = json.loads(metadata[name])
    damage(document, rng)
    metadata[name] = json.dumps(_resealed(document, rng))
    return joined(header, payload)


def _payload(data: bytes, rng: random.Random) -> bytes:
    """Values: bits flipped, NaN, infinite, huge."""
    header, payload = split(data)
    if not payload:
        return data
    at = rng.randrange(len(payload)) // 4 * 4
    what = rng.choice(
        (
            struct.pack("<f", float("nan")),
            struct.pack("<f", float("inf")),
            struct.pack("<f", 3e38),
            b"\xff" * 8,
            bytes(400),
        )
    )
    return joined(header, payload[:at] + what + payload[at + len(what) :])[: len(data)]
