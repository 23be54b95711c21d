"""The model's own forward pass over every sample, each standing still at the decoder layer whose turn it is.

For models whose layers hand one another more than hidden states: a layer is called with what the model calls it with,
and all that it returns goes back to where the model takes it. What the model keeps at hand for each sample stays on the
compute device.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor

from trimcli.console import Progress
from trimcli.errors import TrimError
from trimcli.methods.masks import slices
from trimcli.model.forward import call_model, called_with, first_output, split_call
from trimcli.model.skeleton import DecoderLayer, Skeleton
from trimcli.pipeline.stream import Logits, Stream

Call = tuple[int, tuple[Any, ...], dict[str, Any]]
"""A layer's index, and what the model calls it with."""


class Suspended(Stream):
    """Samples in suspended forward passes, a batch in each; of text, whose samples may each take its own way, one.

    What belongs to a batch is kept under the number of its first sample.
    """

    def __init__(self, skeleton: Skeleton, samples: Tensor, batch_size: int, progress: Progress) -> None:
        self.skeleton = skeleton
        self.batch_size = batch_size if skeleton.images else 1
        self.least = slice(0, self.batch_size)
        self._passes: dict[int, greenlet] = {}
        self._calls: dict[int, Call] = {}
        self._ends: dict[int, Any] = {}
        self._logits: dict[int, Tensor] = {}
        with self.advancing(), progress.task("embedding", len(samples)) as advance:
            for rows in slices(len(samples), self.batch_size):
                self._passes[rows.start] = forward = greenlet(self._pass)
                self._calls[rows.start] = self._arrived(forward, 0, samples[rows])
                advance(rows.stop - rows.start)

    def _pass(self, samples: Tensor) -> Tensor:
        """What runs in a greenlet: it is given each layer's result where it asked for it, and ends with the logits."""
        logits: Tensor = call_model(self.skeleton, samples).logits
        return logits

    def _resume(self, forward: greenlet, value: Any) -> Any:
        """Let a pass run up to its next layer, whose `Call` is returned, or to its end, which returns its logits."""
        outside = greenlet.getcurrent()

        def standing(layer: DecoderLayer) -> Any:
            return lambda *args, **kwargs: outside.switch((layer.index, args, kwargs))

        for layer in self.skeleton.layers:
            layer.module.forward = standing(layer)
        try:
            with torch.no_grad():
                return forward.switch(value)
        finally:
            for layer in self.skeleton.layers:
                del layer.module.forward

    def _arrived(self, forward: greenlet, index: int, value: Any) -> Call:
        call: Call = self._resume(forward, value)
        if forward.dead or call[0] != index:
            what = f"the forward pass of {self.skeleton.checkpoint.id} does not call layer {index} when its turn comes"
            raise TrimError(f"{what}; its form is not supported.")
        return call

    def states(self, rows: slice) -> Tensor:
        """The hidden states [b, L, H] of the samples `rows`; past the last layer its outputs, until they are taken."""
        if rows.start in self._ends:
            return first_output(self._ends[rows.start])
        _, args, kwargs = self._calls[rows.start]
        hidden: Tensor = split_call(args, kwargs)[0]
        return hidden

    def arguments(self, layer: DecoderLayer, rows: slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the layer is called with for the samples `rows`: positional arguments and named ones."""
        _, args, kwargs = self._calls[rows.start]
        # A copy: a layer that adds to what it is given may be run again.
        return called_with(self.states(rows).clone(), args, kwargs)

    def run(self, layer: DecoderLayer, rows: slice, hidden: Tensor | None = None) -> Any:
        """All that the loaded layer returns for the samples `rows`, or for other hidden states [b, L, H]."""
        args, kwargs = self.arguments(layer, rows)
        if hidden is not None:
            args, kwargs = called_with(hidden, args, kwargs)
        with torch.no_grad():
            return layer.module(*args, **kwargs)

    def put(self, layer: DecoderLayer, rows: slice, result: Any) -> None:
        """Let the samples `rows` go on to the next layer with `result`, all that this one returned for them."""
        forward = self._passes[rows.start]
        if self.skeleton.is_last(layer):
            self._ends[rows.start] = result
        else:
            self._calls[rows.start] = self._arrived(forward, layer.index + 1, result)

    @property
    def divides(self) -> bool:
        """A batch that is on its way stays together."""
        return False

    def shrink(self, batch_size: int, sizes: Collection[int]) -> None:
        """Batches stay as they are."""
        raise AssertionError("a batch on its way cannot be divided")

    def takes(self, sizes: Collection[int]) -> bool:
        """Only the batches that there are."""
        return set(sizes) <= {self.batch_size}

    @contextmanager
    def advancing(self) -> Iterator[None]:
        """Around the `put` of all samples after one layer: what the model calls between layers is filled on use."""
        with self.skeleton.filled_on_use():
            yield

    @contextmanager
    def head(self) -> Iterator[Logits]:
        """The part of the model after the last layer, loaded on use and dropped after."""
        with self.advancing():
            yield self._finished

    def _finished(self, rows: slice, part: slice) -> Tensor:
        firsts = range(rows.start, rows.stop, self.batch_size)
        for first in firsts:
            if first in self._ends:
                self._logits[first] = self._resume(self._passes[first], self._ends.pop(first))
        self._logits = {first: self._logits[first] for first in firsts}
        return torch.cat(list(self._logits.values()))[:, part]
