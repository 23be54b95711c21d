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
from trimcli.model.forward import called_with, split_call
from trimcli.model.skeleton import DecoderLayer, Skeleton
from trimcli.pipeline.stream import Logits, Stream

Call = tuple[int, tuple[Any, ...], dict[str, Any]]
"""A layer's index, and what the model calls it with."""


class Suspended(Stream):
    """Samples in as many suspended forward passes. tokens: integer [N, L]."""

    batch_size = 1

    def __init__(self, skeleton: Skeleton, tokens: Tensor, progress: Progress) -> None:
        self.skeleton = skeleton
        self._passes = [greenlet(self._pass) for _ in range(len(tokens))]
        self._calls: list[Call] = []
        self._ends: dict[int, Any] = {}
        self._logits: dict[int, Tensor] = {}
        with self.advancing(), progress.task("embedding", len(tokens)) as advance:
            for sample, forward in enumerate(self._passes):
                self._calls.append(self._arrived(forward, 0, tokens[sample : sample + 1]))
                advance()

    def _pass(self, tokens: Tensor) -> Tensor:
        """What runs in a greenlet: it is given each layer's result where it asked for it, and ends with the logits."""
        model = self.skeleton.model
        logits: Tensor = model(input_ids=tokens.to(self.skeleton.device, torch.long), use_cache=False).logits
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
        """The hidden states [1, L, H] of the sample `rows`."""
        _, args, kwargs = self._calls[rows.start]
        hidden: Tensor = split_call(args, kwargs)[0]
        return hidden

    def arguments(self, layer: DecoderLayer, rows: slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the layer is called with for the sample `rows`: positional arguments and named ones."""
        _, args, kwargs = self._calls[rows.start]
        # A copy: a layer that adds to what it is given may be run again.
        return called_with(self.states(rows).clone(), args, kwargs)

    def run(self, layer: DecoderLayer, rows: slice, hidden: Tensor | None = None) -> Any:
        """All that the loaded layer returns for the sample `rows`, or for other hidden states [1, L, H]."""
        args, kwargs = self.arguments(layer, rows)
        if hidden is not None:
            args, kwargs = called_with(hidden, args, kwargs)
        with torch.no_grad():
            return layer.module(*args, **kwargs)

    def put(self, layer: DecoderLayer, rows: slice, result: Any) -> None:
        """Let the sample `rows` go on to the next layer with `result`, all that this one returned for it."""
        forward = self._passes[rows.start]
        if layer.index + 1 < len(self.skeleton.layers):
            self._calls[rows.start] = self._arrived(forward, layer.index + 1, result)
        else:
            self._ends[rows.start] = result

    def shrink(self, batch_size: int, sizes: Collection[int]) -> None:
        """Batches are single samples already."""
        raise AssertionError("a sample cannot be divided")

    def takes(self, sizes: Collection[int]) -> bool:
        """Only single samples."""
        return set(sizes) <= {1}

    @contextmanager
    def advancing(self) -> Iterator[None]:
        """Around the `put` of every sample after one layer: what the model calls between layers is filled on use."""
        with self.skeleton.filled_on_use():
            yield

    @contextmanager
    def head(self) -> Iterator[Logits]:
        """The part of the model after the last layer, loaded on use and dropped after."""
        with self.advancing():
            yield self._finished

    def _finished(self, rows: slice, part: slice) -> Tensor:
        samples = range(rows.start, rows.stop)
        for sample in samples:
            if sample in self._ends:
                self._logits[sample] = self._resume(self._passes[sample], self._ends.pop(sample))
        self._logits = {sample: self._logits[sample] for sample in samples}
        return torch.cat(list(self._logits.values()))[:, part]
