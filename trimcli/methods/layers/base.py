"""Layer allocation: how much of the target each decoder layer, or each linear, is to lose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from trimcli.registry import Entry, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.stats import LinearStats

T = TypeVar("T")


class Survey(Protocol):
    """What an allocation may look at, one matrix at a time. counts: float64 [n], weights. imported: `--import`.

    samples: how many calibration samples there are to try candidates on.
    """

    names: Sequence[str]
    shapes: Mapping[str, tuple[int, int]]
    layers: Sequence[Sequence[str]]
    counts: Tensor
    seed: int
    imported: Tensor | None
    samples: int

    def weight(self, name: str) -> Tensor:
        """A linear's weight [D_out, D_in] as stored, on the compute device."""

    def stats(self, name: str) -> LinearStats:
        """Its statistics on dense inputs, on the compute device: what the allocation needs."""

    def remembered(self, metric: str, find: Callable[[str], Mapping[str, float]]) -> list[float]:
        """Every linear's `metric`, of an earlier run or by `find(name)`, all of which is kept. Raises InputError."""

    def losses(self, candidates: Sequence[Tensor], samples: slice) -> list[float]:
        """How far the model is from the dense one on these calibration samples under each candidate, float64 [n].

        Mean KL divergence of the predictions, nats a token, pruned by wanda without propagation. For what `tries`.
        """

    def each(self, title: str, items: Sequence[T]) -> Iterable[T]:
        """The items, with progress."""


@dataclass(frozen=True)
class Allocation:
    """What an allocation proposes: sparsity, float64 [n], metric, what each comes from, and final N:M patterns."""

    target: float
    sparsity: Tensor
    metric: list[float | None]
    parameters: dict[str, Any]
    pattern: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class Trials:
    """What an allocation tries at most: candidates, calibration samples for each, candidates that walk together."""

    candidates: int
    samples: int
    together: int


@dataclass(frozen=True, kw_only=True)
class LayerAllocation(Entry):
    """A layer allocation: function(survey, target[, options]) gives an Allocation. needs: of dense inputs.

    imports: which `.npy` it takes, ratios per decoder layer or metrics per linear. remembers: whether it measures what
    a metrics file can keep. config_only: needs no weights. weight_bytes: memory for each weight of a matrix looked at.
    """

    imports: Literal["ratios", "metrics"] | None = None
    remembers: bool = False
    config_only: bool = False
    tries: bool = False
    weight_bytes: int = 24


ALLOCATIONS = Registry("layer allocation", "--method", LayerAllocation)
layer_allocation = ALLOCATIONS.register


def spread(survey: Survey, values: Tensor) -> Tensor:
    """One value per decoder layer [layers] -> one per linear [n]."""
    import torch

    return values.repeat_interleave(torch.tensor([len(layer) for layer in survey.layers]))
