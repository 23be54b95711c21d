"""Which model a checkpoint is: its structure, from the config and the shapes, and its content, from every byte.

The content is `2:` and the SHA-256 of every tensor's name, dtype, shape and XXH3-128 over all its bytes, in the order
of the names, however they are spread over files. Any changed value shows, be it a row, a column or a single bit. XXH3
is no cryptographic hash: a model that was made to have another's is not told apart. Not seen are the small files (the
tokenizer), and the bytes of a tensor whose dtype torch lacks. Up to version 0.2 the content was the SHA-256, without
prefix, of 64 values of every tensor: that is computed only where a file asks for it.
"""

import contextlib
import hashlib
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from trimcli.errors import TrimError
from trimcli.files.cache import Cache
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.documents import canonical_json, read_json, write_json
from trimcli.files.manifest import ModelFingerprint
from trimcli.files.tensors import TensorSpec, natural, tensor_hash

# Of a config.json: what does not change which function of the weights the model is.
TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}
VOLATILE = TOKEN_IDS | {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "architectures"}
VERSION = "2:"
SAMPLES = 64
# A file's times are coarser than this: what is younger may change once more without a trace in them.
SETTLED_NS = 2 * 10**9


def fingerprint_of(checkpoint: Checkpoint, shapes: Mapping[str, list[int]]) -> ModelFingerprint:
    """The fingerprint of a model whose parameters, name -> shape, are `shapes`; without content where only a config is.

    Every byte is read once: the content of files that have not changed since is taken from the user's cache folder.
    """
    kept = {key: value for key, value in checkpoint.config_document.items() if key not in VOLATILE}
    structure = hashlib.sha256(canonical_json([kept, shapes]).encode()).hexdigest()
    if not checkpoint.has_weights:
        return ModelFingerprint(checkpoint.id, structure)
    return ModelFingerprint(checkpoint.id, structure, _content(checkpoint), lambda: _earlier_content(checkpoint))


def _content(checkpoint: Checkpoint) -> str:
    state, started = _state(checkpoint.directory), time.time_ns()
    place = None
    with contextlib.suppress(TrimError, OSError):  # a cache that cannot be used is no reason not to go on
        place = Cache().file("fingerprints", [VERSION, state], ".json")
        known = str(read_json(place).get("content")) if place.is_file() else ""
        if re.fullmatch(f"{VERSION}[0-9a-f]{{64}}", known):
            return known
    content, specs = hashlib.sha256(), checkpoint.specs()
    for key in sorted(checkpoint.keys(), key=natural):
        content.update(f"{key} ".encode())
        if key in specs:
            content.update(f"{_described(specs[key])} {tensor_hash(checkpoint.load(key))} ".encode())
    found = VERSION + content.hexdigest()
    latest = max(max(times) for *_, times in state)
    if place is not None and started - latest > SETTLED_NS and _state(checkpoint.directory) == state:
        with contextlib.suppress(TrimError, OSError):
            write_json(place, {"content": found}, force=True)
    return found


def _state(directory: Path) -> list[tuple[str, int, int, list[int]]]:
    """Of every file in the directory: path, inode, bytes, and when it and its inode last changed."""
    found = [(path, path.stat()) for path in sorted(directory.resolve().iterdir()) if path.is_file()]
    return [(str(path), at.st_ino, at.st_size, [at.st_mtime_ns, at.st_ctime_ns]) for path, at in found]


def _described(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def _earlier_content(checkpoint: Checkpoint) -> str:
    """What version 0.2 called the content."""
    content = hashlib.sha256()
    for key in sorted(checkpoint.keys(), key=natural):
        spec = checkpoint.spec(key)
        content.update(f"{key} {_described(spec)}".encode())
        if math.prod(spec.shape):
            flat = checkpoint.load(key).reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
            content.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
