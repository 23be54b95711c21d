"""Writing what a training made: a pruned directory as apply-masks writes it, or a plain adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimcli.commands.apply import pruned_linear
from trimcli.console import Progress
from trimcli.errors import TrimError
from trimcli.files.atomic import MARK, atomic_directory
from trimcli.files.directory import PrunedTensors, commands_so_far, masked, write_model
from trimcli.files.documents import write_json
from trimcli.files.manifest import ADAPTER, PACKED, PRUNED, ModelFingerprint, manifest, sealed
from trimcli.files.packing import PackedTensors
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton
from trimcli.text.stdin import file_of
from trimcli.training.modes import Outcome
from trimcli.training.options import FinetuneOptions
from trimcli.world import is_first


@dataclass(frozen=True)
class Trained:
    """A trained model. origin: the manifest of what it was trained from or of its masks, empty for a dense one.

    entries: by linear, `target` and `pattern` of its mask. training: what the manifest says of the training.
    """

    skeleton: Skeleton
    options: FinetuneOptions
    origin: Mapping[str, Any]
    entries: Mapping[str, Mapping[str, Any]]
    outcome: Outcome
    training: Mapping[str, Any]

    def write(self, output: Path, *, force: bool, progress: Progress) -> dict[str, Any]:
        """Write it; returns its `trim.json`. Raises UsageError, ResourceError, and TrimError as `weight` does."""
        packed = (self.options.format or ("packed" if self.skeleton.checkpoint.is_packed else "dense")) == "packed"
        if self.outcome.adapter is not None:
            return self._write_adapter(output, force=force)
        document = self._document(PACKED if packed else PRUNED)
        if not is_first():
            return document
        linears, matrices = {}, self.skeleton.matrices(self.entries)
        for name, entry in self.entries.items():
            keep = self.outcome.keep_of(name)
            zeros = keep.numel() - int(keep.count_nonzero())
            linears[name] = pruned_linear(matrices[name], {**entry, "zeros": zeros})
        kind = PackedTensors if packed else PrunedTensors
        tensors = kind(self.skeleton.checkpoint, self.weight, linears, self.outcome.keep_of)
        return write_model(tensors, output, document, force=force, progress=progress).document

    def _document(self, schema: str) -> dict[str, Any]:
        """The manifest: the model stays the one that the pruned directory came from."""
        options, said = self.options, self.origin.get("model")
        sources = {
            "masks": options.masks,
            "ratios": options.ratios,
            "tokens": options.tokens and file_of(options.tokens),
            "pruned": mark if (mark := self.skeleton.checkpoint.directory / MARK).is_file() else None,
        }
        more: dict[str, Any] = {"training": self.training, "commands": commands_so_far(self.origin)}
        if self.origin and options.mode != "admm":
            own = {key: value for key, value in self.origin.items() if key not in ("linears", "packed")}
            more["pruning"] = self.origin.get("pruning") or own
        model = ModelFingerprint(**said) if said else self.skeleton.fingerprint
        return manifest(schema, "finetune", options.document(), model, sources, **more)

    def _write_adapter(self, output: Path, *, force: bool) -> dict[str, Any]:
        document = sealed(self._document(ADAPTER))
        if is_first():
            with atomic_directory(output, force=force) as folder:
                self.outcome.adapter.save_pretrained(str(folder))
                write_json(folder / MARK, document)
        return document

    def weight(self, key: str) -> Tensor | None:
        """What replaces a checkpoint tensor: in its own dtype, +0.0 outside of its mask; None where it stays.

        Raises TrimError for values that the dtype does not hold.
        """
        name = self._trained_names.get(key)
        if name is None:
            return None
        value = self.outcome.values[name].to(self.skeleton.checkpoint.spec(key).dtype)
        if not bool(torch.isfinite(value).all()):
            raise TrimError(f"the trained {name} has values that {value.dtype} does not hold; give a smaller --lr.")
        linear = self._masked.get(key)
        if linear is None:
            return value
        return linear.replaced(value, masked(linear.within(value), self.outcome.keep_of(linear.name)))

    @cached_property
    def _masked(self) -> dict[str | None, Matrix]:
        """Checkpoint tensor -> the matrix in it that has a mask."""
        matrices = self.skeleton.matrices(self.entries)
        return {linear.key: linear for linear in map(matrices.__getitem__, self.entries)}

    @cached_property
    def _trained_names(self) -> dict[str, str]:
        """Checkpoint tensor -> the trained parameter whose values it takes; tied parameters are one."""
        model = self.skeleton.model
        everything = dict(model.named_parameters(remove_duplicate=False))
        own = {id(everything[name]): name for name in self.outcome.values}
        found = {key: own.get(id(everything[name])) for key, name in self.skeleton.stored_parameters().items()}
        return {key: name for key, name in found.items() if name is not None}
