"""OWL: decoder layers with more outliers among their scores keep more (Yin et al. 2024, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from trimcli.errors import OptionError
from trimcli.methods.layers.base import Allocation, Survey, layer_allocation, spread
from trimcli.methods.scores import wanda
from trimcli.methods.stats import SQNORM
from trimcli.options import at_least, check_fields, not_negative, option

if TYPE_CHECKING:
    from torch import Tensor

PANEL = "OWL"


@dataclass(frozen=True)
class OwlOptions:
    """How outliers become sparsities. Raises OptionError for a value that cannot be used."""

    lambda_: float = option(
        0.08, "How far a layer may lie from the target (of N when mixed N:M).", panel=PANEL, check=not_negative
    )
    hyper_m: float = option(
        5.0, "A score is an outlier above this many times the mean.", panel=PANEL, check=not_negative
    )
    group: int | None = option(
        None, "Mixed N:M patterns with groups of this many inputs; N is what is kept.", panel=PANEL, check=at_least(2)
    )
    special: bool = option(
        False, "Mixed N:M as published under that name: a layer that would keep 1 more keeps 2 more.", panel=PANEL
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.special and self.group is None:
            raise OptionError("--special does nothing without --group, which makes the patterns mixed N:M; add it.")


@layer_allocation(
    "owl",
    needs={SQNORM},
    title="OWL",
    source="Yin et al. 2024, section 3.2",
    options=OwlOptions,
    imports="ratios",
    weight_bytes=12,
)
def owl(survey: Survey, target: float, options: OwlOptions) -> Allocation:
    """Decoder layers with more outliers among their wanda scores keep more."""
    import torch

    if survey.imported is not None:
        return Allocation(target, spread(survey, 1 - survey.imported), [None] * len(survey.names), {})
    for name, (_, d_in) in survey.shapes.items():
        if options.group is not None and d_in % options.group:
            raise OptionError(f"--group {options.group} does not divide the {d_in} inputs of {name}; choose another.")

    def scored(name: str) -> Tensor:
        return wanda(survey.weight(name), survey.stats(name))

    layers = survey.each("outliers", survey.layers)
    found = [outlier_share(partial(map, scored, layer), options.hyper_m) for layer in layers]
    outliers = torch.tensor(found, dtype=torch.float64)
    parameters: dict[str, Any] = {"lambda": options.lambda_, "hyper_m": options.hyper_m}
    metric: list[float | None] = list(spread(survey, outliers).tolist())
    if options.group is None:
        sparsity = 1 - keep_ratios(outliers, target, options.lambda_)
        return Allocation(target, spread(survey, sparsity), metric, parameters)
    kept = kept_of_group(outliers, target, options.group, options.lambda_, special=options.special)
    parameters |= {"group": options.group} | ({"special": True} if options.special else {})
    counts = spread(survey, torch.tensor(kept))
    pattern = [(count, options.group) for count in counts.tolist()]
    return Allocation(target, 1 - counts.double() / options.group, metric, parameters, pattern)


def outlier_share(scores: Callable[[], Iterable[Tensor]], hyper_m: float) -> float:
    """The layerwise outlier distribution D, in percent, of one decoder layer (Yin et al. 2024, equation 2).

    The share of scores above hyper_m times their mean. scores: yields the score matrices of the layer's linears, one at
    a time; called for the mean and for the count.
    """
    # map, unlike a loop, lets go of a matrix before the next is made.
    sums = list(map(_sum_and_count, scores()))
    count = sum(numel for _, numel in sums)
    threshold = hyper_m * (math.fsum(total for total, _ in sums) / count)
    return 100.0 * sum(map(partial(_count_above, threshold), scores())) / count


def _sum_and_count(matrix: Tensor) -> tuple[float, int]:
    import torch

    return float(matrix.sum(dtype=torch.float64)), matrix.numel()


def _count_above(threshold: float, matrix: Tensor) -> int:
    return int((matrix > threshold).sum())


def keep_ratios(outliers: Tensor, target: float, lambda_: float) -> Tensor:
    """What each decoder layer keeps, float64 [layers] with mean 1 - target; lambda_: half the spread."""
    shares = _rescaled(outliers) * (2 * lambda_)
    return shares - shares.mean() + (1 - target)


def kept_of_group(outliers: Tensor, target: float, group: int, lambda_: float, *, special: bool = False) -> list[int]:
    """Mixed N:M: how many of each `group` consecutive inputs each decoder layer keeps, 1..group. Raises OptionError.

    outliers: float64 [layers]. On average round(target * group) of a group go. lambda_: how many kept weights lie
    between the extreme layers, a half rounded to even. special: an offset of +1 counts as +2, as in the published code.
    """
    pruned = round(target * group)
    shares = _rescaled(outliers) * lambda_
    extra = (shares - shares.mean()).round().long()
    if special:
        extra[extra == 1] = 2
    kept = (group - pruned + extra).tolist()
    for layer, count in enumerate(kept):
        if not 1 <= count <= group:
            how = f"with --group {group}, --sparsity {target:g} and --lambda {lambda_:g}"
            what = f"decoder layer {layer} would keep {count} of {group} weights"
            raise OptionError(f"{how} {what}; lower --lambda or change --sparsity.")
    return kept


def _rescaled(outliers: Tensor) -> Tensor:
    """Onto [0, 1]; all zero where the values are all equal."""
    low, high = float(outliers.min()), float(outliers.max())
    if not math.isfinite(high - low) or high == low:
        return outliers.new_zeros(outliers.shape)
    return (outliers - low) / (high - low)
