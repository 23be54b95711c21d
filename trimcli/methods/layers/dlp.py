"""DLP: decoder layers whose typical score is a small share of all layers' keep more (Chen et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from trimcli.methods.layers.base import Allocation, Survey, layer_allocation, spread
from trimcli.methods.layers.owl import keep_ratios
from trimcli.methods.scores import wanda
from trimcli.methods.stats import SQNORM
from trimcli.options import check_fields, not_negative, option

if TYPE_CHECKING:
    from torch import Tensor

HALF = 16


@dataclass(frozen=True)
class DlpOptions:
    """How importances become sparsities. Raises OptionError for a value that cannot be used."""

    alpha: float = option(
        0.15, "How far a layer may lie from the target.", "--dlp-alpha", panel="DLP", check=not_negative
    )

    def __post_init__(self) -> None:
        check_fields(self)


@layer_allocation(
    "dlp", needs={SQNORM}, title="DLP", source="Chen et al. 2025, section 3", options=DlpOptions, weight_bytes=20
)
def dlp(survey: Survey, target: float, options: DlpOptions) -> Allocation:
    """Decoder layers whose median wanda score is a small share of all layers' medians keep more."""
    import torch

    def scored(name: str) -> Tensor:
        return wanda(survey.weight(name), survey.stats(name))

    layers = survey.each("medians", survey.layers)
    medians = torch.tensor([median_of(partial(map, scored, layer)) for layer in layers], dtype=torch.float64)
    importance = 1 - medians / medians.sum().clamp(min=torch.finfo(torch.float64).tiny)
    sparsity = 1 - keep_ratios(importance, target, options.alpha)
    return Allocation(target, spread(survey, sparsity), spread(survey, importance).tolist(), {"alpha": options.alpha})


def median_of(scores: Callable[[], Iterable[Tensor]]) -> float:
    """The lower median of matrices that are never in memory together: float32 scores, none of them negative.

    Their bits, as integers, are in their order: one round counts the upper halves, another the lower halves of those
    that lie where the median does. scores: yields the matrices, one at a time; called twice.
    """
    import torch

    def counts(bits: Iterable[Tensor]) -> Tensor:
        total = torch.zeros(1 << HALF, dtype=torch.int64)
        for one in bits:
            total += torch.bincount(one, minlength=1 << HALF).cpu()
        return total

    def halves(matrix: Tensor) -> tuple[Tensor, Tensor]:
        bits = matrix.contiguous().view(torch.int32).flatten()
        return bits >> HALF, bits & ((1 << HALF) - 1)

    upper = counts(halves(matrix)[0] for matrix in scores())
    wanted = (int(upper.sum()) + 1) // 2
    place = int(torch.searchsorted(upper.cumsum(0), wanted))
    before = int(upper[:place].sum())
    lower = counts(low[high == place] for high, low in map(halves, scores()))
    rest = int(torch.searchsorted(lower.cumsum(0), wanted - before))
    return float(torch.tensor((place << HALF) + rest, dtype=torch.int32).view(torch.float32))
