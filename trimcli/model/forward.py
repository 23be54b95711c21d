"""The parts of a forward pass around the decoder layers: embedding and recording before them, the head after them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from trimcli.errors import TrimError
from trimcli.model.skeleton import DecoderLayer, Returns, Skeleton

Recording = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""What the layers are called with for batches of one shape: per layer (args, kwargs) after the hidden states."""

Embedder = Callable[[Tensor], tuple[Tensor, Recording]]
"""Samples -> (hidden states [b, L, H], what every layer is called with for this batch)."""

Head = Callable[[Tensor], Tensor]
"""Final hidden states [b, L, H] -> logits [b, L, vocabulary]; of an image classifier [b, classes]."""


class _AllRecorded(Exception):
    """Leaves the forward pass at the last decoder layer, before the head."""


def call_model(skeleton: Skeleton, samples: Tensor) -> Any:
    """The model's own forward pass over samples: tokens, integer [b, L], or pixels, float [b, C, H, W]."""
    if skeleton.images:
        return skeleton.model(pixel_values=samples.to(skeleton.device, skeleton.dtype))
    return skeleton.model(input_ids=samples.to(skeleton.device, torch.long), use_cache=False)


class Forward:
    """A skeleton's own forward pass, with something else in the place of its layers. samples: one, or more, of many."""

    def __init__(self, skeleton: Skeleton, samples: Tensor) -> None:
        self.skeleton = skeleton
        self._one = samples[:1]

    def around(self, samples: Tensor, replace: Callable[[DecoderLayer], Any], *, graph: bool = False) -> Any:
        """The model's own forward pass with every layer's forward replaced by `replace(layer)`; `graph` is kept."""
        for layer in self.skeleton.layers:
            layer.module.forward = replace(layer)
        try:
            with torch.set_grad_enabled(graph):
                return call_model(self.skeleton, samples)
        finally:
            for layer in self.skeleton.layers:
                del layer.module.forward

    def returns(self) -> Returns:
        """What the layers give back; where nobody knows it yet, the first one is run for it."""
        if self.skeleton.returns is None:
            found: list[Any] = []

            def running(layer: DecoderLayer) -> Any:
                own = layer.module.forward

                def forward(*args: Any, **kwargs: Any) -> Any:
                    self.skeleton.load_layer(layer)
                    try:
                        found.append(own(*args, **kwargs))
                    finally:
                        self.skeleton.drop_layer(layer)
                    raise _AllRecorded

                return forward

            with self.skeleton.filled_on_use(), contextlib.suppress(_AllRecorded):
                self.around(self._one if self.skeleton.images else torch.zeros(1, 2, dtype=torch.long), running)
            self.skeleton.returns = form_of(found[0])
        return self.skeleton.returns

    def reply(self, hidden: Tensor) -> Any:
        """`hidden` in the form in which the model expects what a layer gives back."""
        kind, length = self.returns()
        if kind == "tensor":
            return hidden
        found = [hidden, *[None] * (length - 1)]
        return tuple(found) if kind == "tuple" else found

    @contextlib.contextmanager
    def embedding(self) -> Iterator[Embedder]:
        """The part before the first layer, loaded on use and dropped after."""
        self.returns()  # now: it may take a forward pass of its own
        with self.skeleton.filled_on_use():
            yield self._embed

    def _embed(self, samples: Tensor) -> tuple[Tensor, Recording]:
        skeleton = self.skeleton
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
                return self.reply(first[0])

            return forward

        try:
            self.around(samples, recorder)
        except _AllRecorded:
            return first[0].to(skeleton.dtype), recording
        called = f"called {len(recording)} of its {len(skeleton.layers)} decoder layers once"
        raise TrimError(f"the forward pass of {skeleton.checkpoint.id} {called}; its form is not supported.")

    @contextlib.contextmanager
    def head(self) -> Iterator[Head]:
        """The part after the last layer (final norm, head), loaded on use and dropped after."""
        skeleton = self.skeleton
        self.returns()
        if skeleton.images:
            with skeleton.filled_on_use():
                yield self._classes
            return
        lookup = skeleton.model.get_input_embeddings()

        def nothing(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
            return torch.zeros(*tokens.shape, lookup.embedding_dim, dtype=skeleton.dtype, device=skeleton.device)

        def logits(hidden: Tensor) -> Tensor:
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            value = self.reply(hidden)
            made = self.around(tokens, lambda layer: lambda *args, **kwargs: value, graph=hidden.requires_grad)
            found: Tensor = made.logits
            return found

        # What the embedding returns is replaced at the last layer anyway: its weights stay on disk.
        lookup.forward = nothing
        try:
            with skeleton.filled_on_use(but=lookup):
                yield logits
        finally:
            del lookup.forward

    def _classes(self, hidden: Tensor) -> Tensor:
        """The logits [b, classes] of final hidden states. What comes before the layers is computed for nothing."""
        value = self.reply(hidden)
        pixels = self._one.expand(len(hidden), *self._one.shape[1:])
        made: Tensor = self.around(pixels, lambda layer: lambda *args, **kwargs: value).logits
        return made


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The hidden states, and the other positional and named arguments of a layer call."""
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


def called_with(
    hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer call with other hidden states in the place of its own."""
    return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})


def first_output(result: Any) -> Tensor:
    """A layer's hidden states: layers return a tensor, or a tuple or list that begins with it."""
    found: Tensor = result[0] if isinstance(result, tuple | list) else result
    return found


def form_of(result: Any) -> Returns:
    """The form of what a layer gave back."""
    if isinstance(result, tuple | list):
        return "tuple" if isinstance(result, tuple) else "list", len(result)
    return "tensor", 1
