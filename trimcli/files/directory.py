"""Writing a pruned model directory: an ordinary Hugging Face one, streamed from shard to shard.

Beside the shards lies `trim.json`: the manifest, and per pruned linear where it is (`key`, `shape`
[D_out, D_in], `transposed`), what was asked (`target`, `pattern`), how many weights its mask took (`pruned`),
and what was written: `zeros`, the exact number of zero weights, and `keep_sha256`, the SHA-256 of the packed
bits of `weight != 0` (a weight that was zero already counts as pruned there).
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import OptionError
from trimcli.files.atomic import MARK, atomic_directory
from trimcli.files.card import with_card
from trimcli.files.checkpoint import BIN_SINGLE, SAFE_INDEX, SAFE_SINGLE, Checkpoint
from trimcli.files.documents import write_json
from trimcli.files.manifest import COMMAND_LINE, sealed
from trimcli.files.masks import keep_digest
from trimcli.files.tensors import TensorSpec, bit_view, natural, write_tensors
from trimcli.methods import masks

README = "README.md"
PREFIXES = "KMGT"
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class PrunedLinear:
    """One pruned matrix as a directory records it.

    key: its tensor's name in the checkpoint. shape: (D_out, D_in). transposed: stored as [D_in, D_out].
    pruned: how many weights its mask takes. target: the sparsity asked for. pattern: (kept, group) of N:M.
    """

    key: str
    shape: tuple[int, int]
    transposed: bool
    pruned: int
    target: float | None = None
    pattern: tuple[int, int] | None = None

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "PrunedLinear":
        """The matrix as an entry of `linears` in `trim.json` describes it."""
        return cls(
            key=entry["key"],
            shape=tuple(entry["shape"]),
            transposed=entry["transposed"],
            pruned=entry["pruned"],
            target=entry["target"],
            pattern=tuple(entry["pattern"]) if entry["pattern"] else None,
        )

    def entry(self, weight: Tensor) -> dict[str, Any]:
        """The record of the matrix as written; `weight` is the stored tensor."""
        keep = (weight.T if self.transposed else weight) != 0
        return {
            "key": self.key,
            "shape": list(self.shape),
            "transposed": self.transposed,
            "target": self.target,
            "pattern": list(self.pattern) if self.pattern else None,
            "pruned": self.pruned,
            "zeros": keep.numel() - int(keep.count_nonzero()),
            "keep_sha256": keep_digest(masks.pack(keep)),
        }


@dataclass(frozen=True)
class WrittenModel:
    """What was written: `trim.json`, and in bytes the tensors of the dense model and the shards on disk."""

    document: dict[str, Any]
    dense_bytes: int
    nbytes: int


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" (decimal) or "5GiB" (binary). Raises OptionError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?", text.strip().upper())
    size = 0
    if found:
        power = PREFIXES.index(found[2]) + 1 if found[2] else 0
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if size < 1:
        raise OptionError(f"{text!r} is not a shard size; write it like 5GB or 500MB.")
    return size


def masked(weight: Tensor, keep: Tensor) -> Tensor:
    """`weight` where `keep`, +0.0 elsewhere. weight: any CPU matrix. keep: bool, of its shape."""
    return torch.from_numpy(bit_view(weight.contiguous()) * keep.numpy()).view(weight.dtype)


def commands_so_far(*sources: Mapping[str, Any]) -> list[str]:
    """The command lines behind the manifests `sources`, each once, in order, and the one that is running."""
    lines = [
        line
        for source in sources
        for line in (source["commands"] if "commands" in source else [source["command_line"]])
    ]
    return list(dict.fromkeys(line for line in [*lines, COMMAND_LINE.get()] if line))


def plan_shards(checkpoint: Checkpoint, max_shard_size: int | None = None) -> dict[str, list[str]]:
    """Safetensors shard name -> tensor names, for a directory written from `checkpoint`.

    The checkpoint's own shards, under their own names (`.bin` ones under the names safetensors ones have), or
    with `max_shard_size`, in bytes, new ones that no shard of more than one tensor exceeds. Of tensors that a
    `.bin` file ties to one memory the first is kept, unless the config says that they are not tied.
    """
    shards = checkpoint.shards()
    twins = _twins(checkpoint) if any(name.endswith(".bin") for name in shards) else set()
    kept = {name: [key for key in keys if key not in twins] for name, keys in shards.items()}
    if max_shard_size is None:
        return {_safe_name(name): keys for name, keys in kept.items()}
    bins: list[list[str]] = []
    room = 0
    for key in sorted((key for keys in kept.values() for key in keys), key=natural):
        nbytes = checkpoint.spec(key).nbytes
        if not bins or nbytes > room:
            bins.append([])
            room = max_shard_size
        bins[-1].append(key)
        room -= nbytes
    if len(bins) == 1:
        return {SAFE_SINGLE: bins[0]}
    return {f"model-{place:05d}-of-{len(bins):05d}.safetensors": keys for place, keys in enumerate(bins, start=1)}


def _safe_name(name: str) -> str:
    if name == BIN_SINGLE:
        return SAFE_SINGLE
    return re.sub(r"^pytorch_model(.*)\.bin$", r"model\1.safetensors", name)


def _twins(checkpoint: Checkpoint) -> set[str]:
    if checkpoint.config_document.get("tie_word_embeddings") is False:
        return set()
    first: dict[tuple[int, TensorSpec], str] = {}
    found = set()
    for keys in checkpoint.shards().values():
        for key in keys:
            place = (checkpoint.load(key).data_ptr(), checkpoint.spec(key))
            if place[1].nbytes and first.setdefault(place, key) != key:
                found.add(key)
    return found


def write_model(
    checkpoint: Checkpoint,
    target: Path,
    weight_of: Callable[[str], Tensor | None],
    document: Mapping[str, Any],
    linears: Mapping[str, PrunedLinear],
    *,
    force: bool = False,
    max_shard_size: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> WrittenModel:
    """Write a pruned model directory, one tensor in memory at a time; the directory appears when complete.

    weight_of(key): what replaces a checkpoint tensor, of the same dtype and shape as stored, or None to carry
    the tensor over. document: the manifest (`trim.pruned/1`), with `commands` of `commands_so_far`; `linears`
    and `sparsity` are added to it. linears: full module name -> matrix. max_shard_size: bytes. Raises
    OutputExists, InputError (no such parent directory).
    """
    shards = plan_shards(checkpoint, max_shard_size)
    names = {linear.key: name for name, linear in linears.items()}
    entries: dict[str, dict[str, Any]] = {}

    total = sum(len(keys) for keys in shards.values())
    with atomic_directory(target, force=force) as directory, progress.task("writing", total) as advance:

        def tensor(key: str) -> Tensor:
            replaced = weight_of(key)
            value = checkpoint.load(key) if replaced is None else replaced
            if key in names:
                entries[names[key]] = linears[names[key]].entry(value)
            advance()
            return value

        for shard, keys in shards.items():
            specs = {key: checkpoint.spec(key) for key in keys}
            write_tensors(directory / shard, specs, tensor, METADATA)
        if list(shards) != [SAFE_SINGLE]:
            _write_index(directory / SAFE_INDEX, shards, checkpoint)
        return finish(directory, checkpoint, shards, document, {name: entries[name] for name in linears})


def _write_index(path: Path, shards: Mapping[str, list[str]], checkpoint: Checkpoint) -> None:
    size = sum(checkpoint.spec(key).nbytes for keys in shards.values() for key in keys)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n")


def finish(
    directory: Path,
    checkpoint: Checkpoint,
    shards: Mapping[str, list[str]],
    document: Mapping[str, Any],
    entries: Mapping[str, Mapping[str, Any]],
) -> WrittenModel:
    """Add to a directory with its shards what lies beside them: config, tokenizer, model card, `trim.json`.

    shards: the dense shards' tensors. entries: `linears` of `trim.json`.
    """
    for path in checkpoint.small_files():
        if path.name != README:
            shutil.copyfile(path, directory / path.name)
    weights = sum(entry["shape"][0] * entry["shape"][1] for entry in entries.values())
    zeros = sum(entry["zeros"] for entry in entries.values())
    complete = sealed({**document, "linears": entries, "sparsity": zeros / weights if weights else 0.0})
    existing = checkpoint.directory / README
    text = existing.read_text(errors="replace") if existing.is_file() else None
    (directory / README).write_text(with_card(text, complete))
    write_json(directory / MARK, complete)
    return WrittenModel(
        document=complete,
        dense_bytes=sum(checkpoint.spec(key).nbytes for keys in shards.values() for key in keys),
        nbytes=sum(path.stat().st_size for path in directory.glob("*.safetensors")),
    )
