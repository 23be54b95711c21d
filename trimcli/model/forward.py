"""The parts of a forward pass around the decoder layers: embedding and recording before them, the head after them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trimcli.errors import TrimError
from trimcli.model.skeleton import DecoderLayer, Skeleton

Recording = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""What the layers are called with for batches of one shape: per layer (args, kwargs) after the hidden states."""

Embedder = Callable[[Tensor], tuple[Tensor, Recording]]
"""Tokens [b, L] -> (hidden states [b, L, H], what every layer is called with for this batch)."""

Head = Callable[[Tensor], Tensor]
"""Final hidden states [b, L, H] -> logits [b, L, vocabulary]."""


class _AllRecorded(Exception):
    """Leaves the forward pass at the last decoder layer, before the head."""


class Forward:
    """A skeleton's own forward pass, with something else in the place of its layers."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton

    def around(self, tokens: Tensor, replace: Callable[[DecoderLayer], Any]) -> Any:
        """The model's own forward pass with every layer's forward replaced by `replace(layer)`."""
        for layer in self.skeleton.layers:
            layer.module.forward = replace(layer)
        try:
            with torch.no_grad():
                return self.skeleton.model(input_ids=tokens.to(self.skeleton.device, torch.long), use_cache=False)
        finally:
            for layer in self.skeleton.layers:
                del layer.module.forward

    @cached_property
    def returns_tuple(self) -> bool:
        """Whether the model expects its layers to return a tuple: seen by what arrives after the first one."""
        shapes: list[Any] = []

        def passing(_: DecoderLayer) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = split_call(args, kwargs)[0]
                shapes.append(hidden.shape)
                if len(shapes) == 2:
                    raise _AllRecorded
                return hidden

            return forward

        probe = torch.zeros(1, 2, dtype=torch.long)
        with self.skeleton.filled_on_use():
            try:
                shapes.append(self.around(probe, passing).logits.shape)
            except _AllRecorded:
                pass
            except (RuntimeError, IndexError, AttributeError, TypeError):
                if not shapes:
                    raise
                shapes.append(())  # with a single layer the norm behind it met half a tuple
        return len(shapes[1]) != 3

    @contextmanager
    def embedding(self) -> Iterator[Embedder]:
        """The part before the first layer, loaded on use and dropped after."""
        with self.skeleton.filled_on_use():
            yield self._embed

    def _embed(self, tokens: Tensor) -> tuple[Tensor, Recording]:
        skeleton, wrap = self.skeleton, self.returns_tuple
        recording: Recording = []
        first: list[Tensor] = []

        def recorder(_: DecoderLayer) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, rest, named = split_call(args, kwargs)
                if not first:
                    first.append(hidden)
                recording.append((rest, named))
                if len(recording) == len(skeleton.layers):
                    raise _AllRecorded
                return (first[0],) if wrap else first[0]

            return forward

        try:
            self.around(tokens, recorder)
        except _AllRecorded:
            return first[0].to(skeleton.dtype), recording
        called = f"called {len(recording)} of its {len(skeleton.layers)} decoder layers once"
        raise TrimError(f"the forward pass of {skeleton.checkpoint.id} {called}; its form is not supported.")

    @contextmanager
    def head(self) -> Iterator[Head]:
        """The part after the last layer (final norm, head), loaded on use and dropped after."""
        skeleton = self.skeleton
        lookup = skeleton.model.get_input_embeddings()
        wrap = self.returns_tuple

        def nothing(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
            return torch.zeros(*tokens.shape, lookup.embedding_dim, dtype=skeleton.dtype, device=skeleton.device)

        def logits(hidden: Tensor) -> Tensor:
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            value = (hidden,) if wrap else hidden
            found: Tensor = self.around(tokens, lambda layer: lambda *args, **kwargs: value).logits
            return found

        # What the embedding returns is replaced at the last layer anyway: its weights stay on disk.
        lookup.forward = nothing
        try:
            with skeleton.filled_on_use(but=lookup):
                yield logits
        finally:
            del lookup.forward


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The hidden states, and the other positional and named arguments of a layer call."""
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


def first_output(result: Any) -> Tensor:
    """A layer's hidden states: layers return a tensor or a tuple, depending on the transformers version."""
    return result[0] if isinstance(result, tuple) else result
