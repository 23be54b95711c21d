"""The metrics that AlphaPruning can allocate by, and which of them one look at a matrix gives."""

import math
import zlib

from torch import Tensor

from trimcli.methods.layers.alpha import alpha_mid, alpha_peak, squared_singular_values
from trimcli.methods.layers.ww_metrics import COLUMNS, RANDOMIZED, weightwatcher_metrics

SPECTRAL = {"alpha_peak": alpha_peak, "alpha_mid": alpha_mid}
METRICS = (*SPECTRAL, *COLUMNS)


def measure(metric: str, name: str, weight: Tensor, seed: int) -> dict[str, float]:
    """`metric` of one matrix and every other metric that falls off on the way.

    name: full module name, which makes the permutation behind `random_distance` the matrix's own, whatever
    the order of the calls. weight: [D_out, D_in], any float dtype, on the device to compute on. Returns
    metric name -> value, only those that are finite; `metric` is missing where the matrix has none.
    """
    if metric in SPECTRAL:
        values = squared_singular_values(weight)
        found = {other: shape(values) for other, shape in SPECTRAL.items()}
    else:
        found = weightwatcher_metrics(weight, zlib.crc32(f"{seed} {name}".encode()))
    return {other: value for other, value in found.items() if math.isfinite(value)}


def cache_key(metric: str, seed: int) -> str:
    """What a metric is called in a cache: with the seed, where it depends on one."""
    return f"{metric} seed {seed}" if metric in RANDOMIZED else metric
