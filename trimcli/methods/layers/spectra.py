"""The shape of a matrix's spectrum in one number (Lu et al. 2024, section 3.2), and ten more from weightwatcher."""

import math
import zlib

import numpy as np
import torch
from torch import Tensor

from trimcli.methods.layers.ww_metrics import RANDOMIZED, weightwatcher_metrics

BINS = 100
BLOCK = 4096
ELEMENTS = 1 << 22


def squared_singular_values(weight: Tensor) -> Tensor:
    """The squared singular values of [D_out, D_in], ascending, float64, within rounding of zero on either side."""
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=weight.device)
    for block in wide.split(BLOCK, dim=1):
        part = block.double()
        gram.addmm_(part, part.T)
    return torch.linalg.eigvalsh(gram)


def alpha_mid(eigenvalues: Tensor) -> float:
    """Hill's exponent over the upper half of a spectrum, float64 [n], ascending; infinity or NaN where it has none."""
    if (zeros := _zeros(eigenvalues)) > len(eigenvalues) // 2:
        eigenvalues = eigenvalues[zeros:]
    tail = eigenvalues[len(eigenvalues) // 2 :]
    return float(_exponents(tail.log())[0]) if len(tail) else math.nan


def alpha_peak(eigenvalues: Tensor) -> float:
    """Hill's estimate from the start that fits best around the peak of a spectrum, float64 [n], ascending; or NaN.

    Starts are values between log10(0.95 p) (a logarithm in the published code, kept) and 1.5 p, p the left edge of the
    fullest of 100 bins of the logarithms; the best has the smallest Kolmogorov-Smirnov distance.
    """
    values = eigenvalues[_zeros(eigenvalues) :]
    count = len(values)
    if count < 2:
        return math.nan
    logs = values.log()
    alphas = _exponents(logs)
    counts, edges = np.histogram(values.log10().cpu().numpy(), BINS)
    peak = 10 ** float(edges[counts.argmax()])
    candidate = (values >= math.log10(0.95 * peak)) & (values <= 1.5 * peak)
    candidate &= (alphas > 1) & alphas.isfinite()
    candidate[-1] = False
    distances = torch.ones(count - 1, dtype=torch.float64, device=values.device)
    for some in candidate.nonzero()[:, 0].split(max(1, ELEMENTS // count)):
        if len(some):
            distances[some] = _distances(logs, alphas, some)
    return float(alphas[int(distances.cpu().numpy().argmin())])


def _zeros(eigenvalues: Tensor) -> int:
    """How many of the ascending values are zero to working precision."""
    tolerance = eigenvalues[-1] * len(eigenvalues) * torch.finfo(torch.float64).eps
    return int((eigenvalues <= tolerance).sum())


def _exponents(logs: Tensor) -> Tensor:
    """alpha_i = 1 + m / (sum of ln e_t over t >= i - m ln e_i), m = n - i, for every i of the logs [n]."""
    sums = logs.flip(0).cumsum(0).flip(0)
    sizes = torch.arange(len(logs), 0, -1, dtype=torch.float64, device=logs.device)
    return 1 + sizes / (sums - sizes * logs)


def _distances(logs: Tensor, alphas: Tensor, starts: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distances [c] of the power laws from the ascending `starts` [c] to the values."""
    first = int(starts[0])
    steps = torch.arange(first, len(logs), device=logs.device) - starts[:, None]
    fitted = 1 - torch.exp((1 - alphas[starts, None]) * (logs[first:] - logs[starts, None]))
    gaps = (fitted - steps / (len(logs) - starts[:, None])).abs()
    return gaps.masked_fill_(steps < 0, 0).amax(1)


def norm(eigenvalues: Tensor) -> float:
    """The squared Frobenius norm, the sum of a spectrum: what AlphaPruning's image code has beside the others."""
    return float(eigenvalues.sum())


SPECTRAL = {"alpha_peak": alpha_peak, "alpha_mid": alpha_mid, "norm": norm}


def measure(metric: str, name: str, weight: Tensor, seed: int) -> dict[str, float]:
    """`metric` of the matrix `name` [D_out, D_in] and every other that falls off on the way: those that are finite."""
    if metric in SPECTRAL:
        values = squared_singular_values(weight)
        found = {other: shape(values) for other, shape in SPECTRAL.items()}
    else:
        found = weightwatcher_metrics(weight, zlib.crc32(f"{seed} {name}".encode()))
    return {other: value for other, value in found.items() if math.isfinite(value)}


def cache_key(metric: str, seed: int) -> str:
    """What a metric is called in a cache: with the seed, where it depends on one."""
    return f"{metric} seed {seed}" if metric in RANDOMIZED else metric
