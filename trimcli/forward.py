"""The parts of a forward pass around the decoder layers: embedding and recording before them, the head after them.

What each layer is called with (masks, position embeddings, per-layer differences such as sliding windows) is
recorded in the model's own forward pass, in which every layer returns its input.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimcli.errors import TrimError

if TYPE_CHECKING:
    from trimcli.model import DecoderLayer, Skeleton


@dataclass
class Recording:
    """What the layers are called with for batches of one shape: per layer (args, kwargs) after the hidden states."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class AllRecorded(Exception):
    """Leaves the forward pass at the last decoder layer, before the head."""


class Embedder:
    """Tokens to the first layer's input, and what every layer is called with."""

    def __init__(self, skeleton: "Skeleton") -> None:
        self._skeleton = skeleton

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Recording]:
        """Tokens [b, L] -> (hidden states [b, L, H], the recording for this batch)."""
        skeleton = self._skeleton
        recording = Recording()
        first: list[Tensor] = []

        def recorder(layer: "DecoderLayer") -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, rest, named = split_call(args, kwargs)
                if not first:
                    first.append(hidden)
                recording.calls.append((rest, named))
                if len(recording.calls) == len(skeleton.layers):
                    raise AllRecorded
                return (first[0],) if wrap else first[0]

            return forward

        wrap = skeleton.returns_tuple
        try:
            skeleton.forward_around(tokens, recorder)
        except AllRecorded:
            return first[0].to(skeleton.dtype), recording
        raise TrimError(
            f"the forward pass of {skeleton.checkpoint.id} called {len(recording.calls)} of its "
            f"{len(skeleton.layers)} decoder layers once; its form is not supported."
        )


class Head:
    """Final hidden states to logits, through the model's own code after the last layer."""

    def __init__(self, skeleton: "Skeleton") -> None:
        self._skeleton = skeleton

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [b, L, H] -> logits [b, L, vocabulary]."""
        skeleton = self._skeleton
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long)
        value = (hidden,) if skeleton.returns_tuple else hidden
        logits: Tensor = skeleton.forward_around(tokens, lambda layer: lambda *args, **kwargs: value).logits
        return logits


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The hidden states, and the other positional and named arguments of a layer call."""
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


def first_output(result: Any) -> Tensor:
    """A layer's hidden states: layers return a tensor or a tuple, depending on the transformers version."""
    return result[0] if isinstance(result, tuple) else result
