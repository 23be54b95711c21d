"""Layers called as the model was seen to call them: all samples' hidden states are one buffer, updated in place."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimcli.console import Progress
from trimcli.errors import InputError
from trimcli.files.spilled import Spilled
from trimcli.methods.masks import slices
from trimcli.model.device import free_bytes
from trimcli.model.forward import Embedder, Forward, Head, Recording, first_output
from trimcli.model.skeleton import DecoderLayer, Skeleton
from trimcli.pipeline.stream import Logits, Stream

# The share of free device memory that the hidden states may take.
SHARE = 0.4


class Recorded(Stream):
    """Samples whose layers are called with what was recorded once for batches of each size."""

    leaves = True

    def __init__(self, skeleton: Skeleton, samples: Tensor, batch_size: int, progress: Progress) -> None:
        self.skeleton, self.batch_size = skeleton, batch_size
        self._spilled: Spilled | None = None
        self.forward = Forward(skeleton, samples)
        self._samples, self._progress = samples, progress
        self._recordings: dict[int, Recording] = {}
        self._own: dict[int, Recording] = {}
        self.hidden = self._embed()
        if self._own and self.batch_size > 1:
            # Calls that depend on the samples are good for the very samples they were recorded with.
            self.batch_size = 1
            self._recordings.clear()
            self._own.clear()
            self.hidden = self._embed()

    def _embed(self) -> Tensor:
        hidden: Tensor | None = None
        count = len(self._samples)
        with self.forward.embedding() as embed, self._progress.task("embedding", count) as advance:
            self._record_size(1, embed)
            # With a single batch there is nothing else to see by whether the calls depend on the samples.
            self._keep_recording(slice(count - 1, count), embed(self._samples[-1:])[1])
            for rows in slices(count, self.batch_size):
                states, recording = embed(self._samples[rows])
                self._keep_recording(rows, recording)
                if hidden is None:
                    hidden, self._spilled = state_buffer(self.skeleton, states, count)
                hidden[rows] = states.to(hidden.device)
                advance(rows.stop - rows.start)
        if hidden is None:
            raise InputError("there are no calibration samples; give at least one.")
        return hidden

    def _keep_recording(self, rows: slice, recording: Recording) -> None:
        """Batches of one size are called alike; where the calls depend on the samples, each batch keeps its own."""
        shared = self._recordings.setdefault(rows.stop - rows.start, recording)
        if shared is not recording and not _alike(shared, recording, self.skeleton.device):
            self._own[rows.start] = recording

    def _record_size(self, size: int, embed: Embedder) -> None:
        if size not in self._recordings:
            self._recordings[size] = embed(self._samples[:size])[1]

    def states(self, rows: slice) -> Tensor:
        """The hidden states [b, L, H] of samples `rows`, on the compute device."""
        if self._spilled is not None:
            self._spilled.ahead(slice(rows.stop, rows.stop + self.batch_size))
            if before := rows.start:  # its results are written, or were not asked for
                self._spilled.behind(slice(max(0, before - self.batch_size), before))
        return self.hidden[rows].to(self.skeleton.device, non_blocking=True)

    def arguments(self, layer: DecoderLayer, rows: slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the layer is called with for samples `rows`: positional arguments and named ones."""
        recording = self._own.get(rows.start) or self._recordings[rows.stop - rows.start]
        args, kwargs = recording[layer.index]
        return (self.states(rows), *args), kwargs

    def run(self, layer: DecoderLayer, rows: slice, hidden: Tensor | None = None) -> Any:
        """All that the loaded layer returns for samples `rows`, or for other hidden states [b, L, H] in their place."""
        args, kwargs = self.arguments(layer, rows)
        with torch.no_grad():
            return layer.module(args[0] if hidden is None else hidden, *args[1:], **kwargs)

    def put(self, layer: DecoderLayer, rows: slice, result: Any) -> None:
        """Let samples `rows` go on to the next layer with `result`, what this one returned for them."""
        self.hidden[rows] = first_output(result).to(self.hidden.device)

    @property
    def divides(self) -> bool:
        """Whether `shrink` is possible."""
        return self.batch_size > 1 and not self._own

    def shrink(self, batch_size: int, sizes: Collection[int]) -> None:
        """Take smaller batches from now on: `batch_size`, and others of `sizes`."""
        self.batch_size = batch_size
        self.takes(sizes)

    def takes(self, sizes: Collection[int]) -> bool:
        """Record calls of other sizes; where the calls depend on the samples, only single ones are taken."""
        if self._own:
            return set(sizes) <= {1}
        if missing := set(sizes) - self._recordings.keys():
            with self.forward.embedding() as embed:
                for size in sorted(missing):
                    self._record_size(size, embed)
        return True

    @contextmanager
    def head(self) -> Iterator[Logits]:
        """The part of the model after the last layer, loaded on use and dropped after."""
        with self.forward.head() as head:
            yield lambda rows, part: head(self.hidden[rows, part].to(self.skeleton.device))

    @contextmanager
    def predictions(self) -> Iterator[Head | None]:
        """From other hidden states [b, L, H] after the last layer their logits, loaded on use and dropped after."""
        with self.forward.head() as head:
            yield head


def state_buffer(skeleton: Skeleton, states: Tensor, count: int) -> tuple[Tensor, Spilled | None]:
    """Room for hidden states [count, L, H] like these [b, L, H]: the device's, the host's, or a file's."""
    shape = (count, *states.shape[1:])
    if skeleton.spill is not None:
        spilled = Spilled(skeleton.spill, shape, states.dtype)
        return spilled.tensor, spilled
    on_host = skeleton.on_host
    if states.device.type != "cpu" and on_host is None:
        on_host = states[0].numel() * count * states.element_size() > SHARE * free_bytes(states.device)
    if states.device.type != "cpu" and on_host:
        return torch.empty(shape, dtype=states.dtype, pin_memory=states.device.type == "cuda"), None
    return torch.empty(shape, dtype=states.dtype, device=states.device), None


def _alike(one: Any, other: Any, device: torch.device) -> bool:
    """Whether two recordings' calls are the same: each pair of tensors compared once, and `device` waited for once."""
    pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    if not _same_form(one, other, pairs):
        return False
    same = [(mine == theirs).all().to(device) for mine, theirs in pairs.values()]
    return not same or bool(torch.stack(same).all())


def _same_form(one: Any, other: Any, pairs: dict[tuple[int, int], tuple[Tensor, Tensor]]) -> bool:
    """Whether two recordings' calls differ in no more than the values of the tensors that go to `pairs`."""
    if isinstance(one, Tensor):
        if one is not other:
            pairs[id(one), id(other)] = (one, other)
        return isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype
    if isinstance(one, dict):
        same = isinstance(other, dict) and one.keys() == other.keys()
        return same and all(_same_form(one[key], other[key], pairs) for key in one)
    if isinstance(one, list | tuple):
        same = isinstance(other, list | tuple) and len(one) == len(other)
        return same and all(_same_form(mine, theirs, pairs) for mine, theirs in zip(one, other, strict=True))
    return type(one) is type(other)
