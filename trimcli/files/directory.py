"""Writing a pruned model directory: an ordinary Hugging Face one, streamed from shard to shard.

Its `trim.json` is the manifest, and per pruned linear where it is (`key`, `shape` [D_out, D_in], `transposed`, and of
a stack of matrices its `place` there), what was asked (`target`, `pattern`), how many weights its mask took (`pruned`),
its exact number of `zeros`, and `keep_sha256`, the SHA-256 of the packed bits of `weight != 0`; and of the kept weights
that are zero, where there are some, the places in row order, `kept_zeros`, so that directory and `trim.json` together
tell the mask.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError
from trimcli.files.atomic import MARK, atomic_directory
from trimcli.files.card import with_card
from trimcli.files.checkpoint import CONFIG, SAFE_INDEX, SAFE_SINGLE, Checkpoint
from trimcli.files.documents import write_json
from trimcli.files.manifest import COMMAND_LINE, with_linears
from trimcli.files.masks import keep_digest
from trimcli.files.names import grouped
from trimcli.files.outputs import check_space
from trimcli.files.tensors import TensorSpec, bit_view, nonzero, write_tensors
from trimcli.methods import masks

README = "README.md"
# So many kept weights at zero are listed of a matrix: more are those of a model that was sparse before.
LISTED = 1 << 16


@dataclass(frozen=True)
class PrunedLinear:
    """A pruned matrix as recorded: [D_in, D_out] if `transposed`; weights its mask takes; (kept, group) of N:M.

    place: which one it is of the stack [E, ., .] that the tensor is, None where it is a matrix itself.
    """

    key: str
    shape: tuple[int, int]
    transposed: bool
    pruned: int
    target: float | None = None
    pattern: tuple[int, int] | None = None
    place: int | None = None

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "PrunedLinear":
        """The matrix as an entry of `linears` in `trim.json` describes it."""
        fields = {field: entry[field] for field in cls.__dataclass_fields__ if field in entry}
        fields.setdefault("pruned", entry["zeros"])
        pattern = tuple(entry["pattern"]) if entry.get("pattern") else None
        return cls(**{**fields, "shape": tuple(entry["shape"]), "pattern": pattern})

    def within(self, tensor: Tensor) -> Tensor:
        """The matrix [D_out, D_in] in the stored tensor, which a 1x1 convolution has more dimensions in, a view."""
        own = tensor if self.place is None else tensor[self.place]
        own = own.flatten(1) if own.ndim == 4 else own
        return own.T if self.transposed else own

    def entry(self, weight: Tensor, keep: Tensor | None = None) -> dict[str, Any]:
        """The record of the matrix as written; `weight` is the stored tensor, `keep` its mask, bool [D_out, D_in]."""
        there = nonzero(self.within(weight))
        zeros = there.numel() - int(np.count_nonzero(there.numpy()))
        found = {**asdict(self), "zeros": zeros, "keep_sha256": keep_digest(masks.pack(there))}
        if self.place is None:
            del found["place"]
        if keep is None or not 0 < zeros - self.pruned <= LISTED:
            return found
        return {**found, "kept_zeros": (keep & ~there).flatten().nonzero().squeeze(1).tolist()}


def matrix_in(tensor: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The matrix that an entry of `linears` in `trim.json` tells of in its tensor, a view.

    Raises InputError where the tensor is no stack that has its place.
    """
    place = entry.get("place")
    if place is not None and not (tensor.ndim == 3 and place < len(tensor)):
        raise InputError(f"{entry['key']} is of shape {list(tensor.shape)}, no stack of {place + 1} matrices or more")
    return PrunedLinear.from_entry(entry).within(tensor)


@dataclass(frozen=True)
class WrittenModel:
    """What was written: `trim.json`, and in bytes the tensors of the dense model and the shards on disk."""

    document: dict[str, Any]
    dense_bytes: int
    nbytes: int


def masked(weight: Tensor, keep: Tensor) -> Tensor:
    """`weight` where `keep`, +0.0 elsewhere. weight: any CPU matrix. keep: bool, of its shape."""
    return torch.from_numpy(bit_view(weight.contiguous()) * keep.numpy()).view(weight.dtype)


def commands_so_far(*sources: Mapping[str, Any]) -> list[str]:
    """The command lines behind the manifests `sources`, each once, in order, and the one that is running."""
    lines = [line for source in sources for line in source.get("commands", [source.get("command_line")])]
    return list(dict.fromkeys(line for line in [*lines, COMMAND_LINE.get()] if line))


def plan_shards(checkpoint: Checkpoint, max_shard_size: int | None = None) -> dict[str, list[str]]:
    """Safetensors shard name -> tensor names: the checkpoint's own shards, or new ones of `max_shard_size` bytes.

    Of tensors that a `.bin` file ties to one memory the first is kept, unless the config says that they are not tied.
    """
    from huggingface_hub import split_state_dict_into_shards_factory as split

    shards = checkpoint.shards()
    twins = _twins(checkpoint) if any(name.endswith(".bin") for name in shards) else set()
    if max_shard_size is None:
        safe = {re.sub(r"^pytorch_model(.*)\.bin$", r"model\1.safetensors", name): name for name in shards}
        return {name: [key for key in shards[stored] if key not in twins] for name, stored in safe.items()}
    specs = {key: checkpoint.spec(key) for key in checkpoint.keys() if key not in twins}  # noqa: SIM118 - no mapping
    size, pattern = (lambda spec: spec.nbytes), "model{suffix}.safetensors"
    found = split(specs, get_storage_size=size, filename_pattern=pattern, max_shard_size=max_shard_size)
    return found.filename_to_tensors


def numbered(stem: str, count: int) -> list[str]:
    """Names for `count` shards, by which nothing takes them for a model's."""
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def nbytes_of(checkpoint: Checkpoint, shards: Mapping[str, list[str]]) -> int:
    """Bytes of the checkpoint's tensors in `shards`, of `plan_shards`."""
    return sum(checkpoint.spec(key).nbytes for keys in shards.values() for key in keys)


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


class PrunedTensors:
    """The tensors of a pruned directory; a subclass may store others. weight_of(key): what replaces one, or None.

    keep_of(name): a linear's mask, bool [D_out, D_in], None where nobody knows it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weight_of: Callable[[str], Tensor | None],
        linears: Mapping[str, PrunedLinear],
        keep_of: Callable[[str], Tensor | None] = lambda _: None,
    ) -> None:
        self.checkpoint, self.linears, self._weight_of, self._keep_of = checkpoint, linears, weight_of, keep_of
        self.names = grouped(linears, lambda name: linears[name].key)
        self.entries: dict[str, dict[str, Any]] = {}

    def plan(self, shards: Mapping[str, list[str]]) -> dict[str, dict[str, TensorSpec]]:
        """File name -> the tensors that it is to hold. shards: of the dense model, of `plan_shards`."""
        return {name: {key: self.checkpoint.spec(key) for key in keys} for name, keys in shards.items()}

    def stored(self, name: str) -> Tensor:
        """A tensor of `plan`."""
        return self.pruned(name)

    def pruned(self, key: str) -> Tensor:
        """A checkpoint tensor, pruned; of a matrix, `entries` holds from then on what `trim.json` records."""
        replaced = self._weight_of(key)
        value = self.checkpoint.load(key) if replaced is None else replaced
        for name in self.names.get(key, ()):
            rows = self.linears[name].within(value)
            more = rows.numel() - int(rows.count_nonzero()) > self.linears[name].pruned
            self.entries[name] = self.linears[name].entry(value, self._keep_of(name) if more else None)
        return value

    def finish(self, directory: Path, shards: Mapping[str, list[str]]) -> dict[str, Any]:
        """Write what belongs to the files of `plan`; returns what `trim.json` says of them."""
        if list(shards) != [SAFE_SINGLE]:
            weight_map = {key: shard for shard, keys in shards.items() for key in keys}
            size = {"total_size": nbytes_of(self.checkpoint, shards)}
            write_json(directory / SAFE_INDEX, {"metadata": size, "weight_map": dict(sorted(weight_map.items()))})
        return {}


def write_model(
    tensors: PrunedTensors,
    target: Path,
    document: Mapping[str, Any],
    *,
    force: bool = False,
    max_shard_size: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> WrittenModel:
    """Write a pruned model directory, one tensor in memory. document: its manifest. UsageError, ResourceError."""
    checkpoint = tensors.checkpoint
    shards = plan_shards(checkpoint, max_shard_size)
    files = tensors.plan(shards)
    total = sum(len(specs) for specs in files.values())
    with atomic_directory(target, force=force) as directory, progress.task("writing", total) as advance:
        check_space({target: sum(spec.nbytes for specs in files.values() for spec in specs.values())})

        def tensor(name: str) -> Tensor:
            advance()
            return tensors.stored(name)

        for file, specs in files.items():
            write_tensors(directory / file, specs, tensor, {"format": "pt"})
        nbytes = sum((directory / file).stat().st_size for file in files)
        entries = {name: tensors.entries[name] for name in tensors.linears}
        complete = with_linears({**document, **tensors.finish(directory, shards)}, entries)
        card = checkpoint.directory / README
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
        add_small_files(directory, checkpoint, with_card(text, complete), complete)
    return WrittenModel(complete, dense_bytes=nbytes_of(checkpoint, shards), nbytes=nbytes)


def add_small_files(directory: Path, checkpoint: Checkpoint, readme: str, document: Mapping[str, Any]) -> None:
    """Add the checkpoint's small files, a `README.md` in place of its own, and `document` as `trim.json`."""
    for path in checkpoint.small_files():
        target = directory / path.relative_to(checkpoint.directory)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if checkpoint.names_quantization:  # of weights that are written as plain ones
        (directory / CONFIG).unlink()
        write_json(directory / CONFIG, checkpoint.config_document)
    (directory / README).write_text(readme, encoding="utf-8", newline="\n")
    write_json(directory / MARK, document)
