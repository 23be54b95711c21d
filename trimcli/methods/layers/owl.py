"""OWL: decoder layers with more outliers among their scores keep more (Yin et al. 2024, section 3.2)."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from trimcli.errors import OptionError


def outlier_share(scores: Callable[[], Iterable[Tensor]], hyper_m: float) -> float:
    """The layerwise outlier distribution D of one decoder layer (Yin et al. 2024, equation 2).

    scores: called twice, once for the mean and once for the count; each call yields the score matrices of
    the layer's linears, one at a time. hyper_m: M, how many times the mean makes an outlier. Returns D in
    percent: 100 * the share of all the layer's scores that exceed M * their mean.
    """
    # map, unlike a loop, lets go of a matrix before the next is made.
    sums = list(map(_sum_and_count, scores()))
    count = sum(numel for _, numel in sums)
    threshold = hyper_m * (math.fsum(total for total, _ in sums) / count)
    above = sum(map(partial(_count_above, threshold), scores()))
    return 100.0 * above / count


def _sum_and_count(matrix: Tensor) -> tuple[float, int]:
    return float(matrix.sum(dtype=torch.float64)), matrix.numel()


def _count_above(threshold: float, matrix: Tensor) -> int:
    return int((matrix > threshold).sum())


def keep_ratios(outliers: Tensor, target: float, lambda_: float) -> Tensor:
    """What each decoder layer keeps.

    outliers: float64 [layers], D in percent. target: mean sparsity. lambda_: half the spread of the result.
    Returns float64 [layers] with mean 1 - target; everywhere 1 - target where all outliers are equal.
    """
    shares = _rescaled(outliers) * (2 * lambda_)
    return shares - shares.mean() + (1 - target)


def kept_of_group(outliers: Tensor, target: float, group: int, lambda_: float) -> list[int]:
    """Mixed N:M: how many of each `group` consecutive inputs each decoder layer keeps.

    outliers: float64 [layers]. target: mean sparsity; on average round(target * group) of a group go.
    lambda_: how many kept weights lie between the extreme layers. A half rounds to the even number. Returns
    one count per layer, 1..group; raises OptionError naming the layer that would keep none or more than all.
    """
    pruned = round(target * group)
    shares = _rescaled(outliers) * lambda_
    extra = np.round((shares - shares.mean()).numpy()).astype(int)
    kept = [int(group - pruned + more) for more in extra]
    for layer, count in enumerate(kept):
        if not 1 <= count <= group:
            raise OptionError(
                f"with --group {group}, --sparsity {target:g} and --lambda {lambda_:g} decoder layer {layer} "
                f"would keep {count} of {group} weights; lower --lambda or change --sparsity."
            )
    return kept


def _rescaled(outliers: Tensor) -> Tensor:
    """Onto [0, 1]; all zero where the values are all equal."""
    low, high = float(outliers.min()), float(outliers.max())
    if not math.isfinite(high - low) or high == low:
        return torch.zeros_like(outliers)
    return (outliers - low) / (high - low)
