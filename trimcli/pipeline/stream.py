"""What the walk stands on: where samples' hidden states are kept, and what a layer is called with for them."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from trimcli.model.forward import Head, first_output
from trimcli.model.skeleton import DecoderLayer


class Logits(Protocol):
    """The model's predictions after the last layer."""

    def __call__(self, rows: slice, part: slice, /) -> Tensor:
        """Logits [b, l, vocabulary] for the positions `part` of the samples `rows`; [b, classes] of whole pictures."""


class Stream(ABC):
    """Samples between two decoder layers. batch_size: of the batches that it takes, in steps from the first sample."""

    batch_size: int
    # Whether a layer may be left half way, to be run again later: whether nothing but its own arguments goes into it.
    leaves = False
    # The fewest samples that a layer can be run on to see what it does.
    least = slice(0, 1)

    @abstractmethod
    def states(self, rows: slice) -> Tensor:
        """The hidden states [b, L, H] of samples `rows`, on the compute device."""

    @abstractmethod
    def arguments(self, layer: DecoderLayer, rows: slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the layer is called with for samples `rows`: positional arguments and named ones."""

    @abstractmethod
    def run(self, layer: DecoderLayer, rows: slice, hidden: Tensor | None = None) -> Any:
        """All that the loaded layer returns for samples `rows`, or for other hidden states [b, L, H] in their place."""

    @abstractmethod
    def put(self, layer: DecoderLayer, rows: slice, result: Any) -> None:
        """Let samples `rows` go on to the next layer with `result`, what this one returned for them."""

    @abstractmethod
    def shrink(self, batch_size: int, sizes: Collection[int]) -> None:
        """Take smaller batches from now on: `batch_size`, and others of `sizes`."""

    @abstractmethod
    def takes(self, sizes: Collection[int]) -> bool:
        """Make ready for batches of other sizes; False where every sample is called in its own way."""

    @property
    def divides(self) -> bool:
        """Whether `shrink` is possible."""
        return self.batch_size > 1

    @contextmanager
    def advancing(self) -> Iterator[None]:
        """Around the `put` of every sample after one layer."""
        yield

    @contextmanager
    @abstractmethod
    def head(self) -> Iterator[Logits]:
        """The part of the model after the last layer, loaded on use and dropped after."""

    @contextmanager
    def predictions(self) -> Iterator[Head | None]:
        """From other hidden states [b, L, H] after the last layer their logits, loaded on use and dropped after.

        None where what follows that layer belongs to each sample's own pass.
        """
        yield None

    def outputs(self, layer: DecoderLayer, rows: slice, hidden: Tensor | None = None) -> Tensor:
        """The hidden states [b, L, H] in what `run` returns."""
        return first_output(self.run(layer, rows, hidden))
