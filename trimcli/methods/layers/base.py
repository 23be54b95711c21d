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
    """What an allocation may look at, one matrix at a time.

    names: the linears in model order. shapes: name -> (D_out, D_in). layers: the names of each decoder layer that has
    linears. counts: float64 [n], weights of every linear. seed: of what draws. imported: `--import`, float64 or None.
    """

    names: Sequence[str]
    shapes: Mapping[str, tuple[int, int]]
    layers: Sequence[Sequence[str]]
    counts: Tensor
    seed: int
    imported: Tensor | None

    def weight(self, name: str) -> Tensor:
        """A linear's weight [D_out, D_in] as stored, on the compute device."""

    def stats(self, name: str) -> LinearStats:
        """Its statistics on dense inputs, on the compute device: what the allocation needs."""

    def remembered(self, metric: str, find: Callable[[str], Mapping[str, float]]) -> list[float]:
        """Every linear's `metric`: from an earlier run, or among what `find(name)` gives, all of which is kept.

        Raises InputError for a linear that has none.
        """

    def each(self, title: str, items: Sequence[T]) -> Iterable[T]:
        """The items, with progress."""


@dataclass(frozen=True)
class Allocation:
    """What an allocation proposes, before it is brought onto the target exactly.

    sparsity: float64 [n], one per linear. metric: what each was derived from. parameters: for the ratios file.
    pattern: for mixed N:M, (kept, group) per linear; it is final.
    """

    target: float
    sparsity: Tensor
    metric: list[float | None]
    parameters: dict[str, Any]
    pattern: list[tuple[int, int]] | None = None


@dataclass(frozen=True, kw_only=True)
class LayerAllocation(Entry):
    """A layer allocation: function(survey, target[, options]) gives an Allocation.

    needs: of dense inputs. imports: what of the published tools' `.npy` it takes, ratios per decoder layer or metrics
    per linear. remembers: whether it measures what a metrics file can keep. config_only: needs no weights.
    """

    imports: Literal["ratios", "metrics"] | None = None
    remembers: bool = False
    config_only: bool = False


ALLOCATIONS = Registry("layer allocation", "--method", LayerAllocation)
layer_allocation = ALLOCATIONS.register
"""Register the decorated function as a layer allocation."""


def spread(survey: Survey, values: Tensor) -> Tensor:
    """One value per decoder layer [layers] -> one per linear [n]."""
    import torch

    return values.repeat_interleave(torch.tensor([len(layer) for layer in survey.layers]))
