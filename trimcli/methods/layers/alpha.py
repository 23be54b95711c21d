"""AlphaPruning: matrices with a heavier spectral tail lose less (Lu et al. 2024, sections 3.2 and 3.3)."""

import math

import numpy as np
import torch
from torch import Tensor

from trimcli.errors import OptionError
from trimcli.methods.layers.projection import uniform

BINS = 100
BLOCK = 4096
ELEMENTS = 1 << 22
# Metrics this close, relative to the largest, are equal: the means of equal metrics differ in the last bits.
EQUAL = 1e-12


def squared_singular_values(weight: Tensor) -> Tensor:
    """The squared singular values of a matrix, ascending.

    weight: [D_out, D_in], any float dtype. Returns float64 [min(D_out, D_in)] on the same device: the
    eigenvalues of the smaller Gram matrix in float64, which resolve more of the lower end than singular
    values in float32 do. Those of a singular matrix lie within rounding of zero, on either side.
    """
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=weight.device)
    for block in wide.split(BLOCK, dim=1):
        part = block.double()
        gram.addmm_(part, part.T)
    return torch.linalg.eigvalsh(gram)


def alpha_mid(eigenvalues: Tensor) -> float:
    """Hill's estimate of the power-law exponent over the upper half of a spectrum.

    eigenvalues: float64 [n], ascending. Zeros are left out where their logarithm would be needed. Returns the
    exponent; infinity or NaN where it has none (all values equal, a single value).
    """
    if _zeros(eigenvalues) > len(eigenvalues) // 2:
        eigenvalues = eigenvalues[_zeros(eigenvalues) :]
    tail = eigenvalues[len(eigenvalues) // 2 :]
    return float(_exponents(tail.log())[0]) if len(tail) else math.nan


def alpha_peak(eigenvalues: Tensor) -> float:
    """Hill's estimate from the start that fits best, of those around the peak of the spectrum.

    eigenvalues: float64 [n], ascending; zeros, which have no logarithm, are left out. Starts are the values
    between log10(0.95 p) (a logarithm in the published code, kept) and 1.5 p, p the left edge of the fullest
    of 100 bins of the logarithms; the best has the smallest Kolmogorov-Smirnov distance. Returns the
    exponent; NaN or infinity where it has none.
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
    starts, step = candidate.nonzero()[:, 0], max(1, ELEMENTS // count)
    for first in range(0, len(starts), step):
        some = starts[first : first + step]
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


def sparsities(
    metrics: Tensor, layers: Tensor, weights: Tensor, target: float, epsilon: float, *, by_block: bool
) -> Tensor:
    """From a metric per linear to a sparsity per linear (Lu et al. 2024, equation 3).

    metrics: float64 [n]. layers: int [n], each linear's decoder layer. weights: [n], weight counts. epsilon:
    the largest and the smallest sparsity are as 1 + epsilon to 1 - epsilon. by_block: every
    linear of a decoder layer has the layer's mean metric instead of its own. Returns float64 [n]
    whose mean weighted by `weights` is `target`. Raises OptionError where epsilon leaves nothing to scale.
    """
    if by_block:
        blocks = int(layers.max()) + 1
        sums = torch.zeros(blocks, dtype=torch.float64).index_add_(0, layers, metrics)
        metrics = (sums / torch.bincount(layers, minlength=blocks))[layers]
    low, high = float(metrics.min()), float(metrics.max())
    if high - low <= EQUAL * max(abs(low), abs(high)):
        return uniform(len(metrics), target)
    shares = (metrics - low) / (high - low) * (2 * epsilon) + (1 - epsilon)
    scale = float((weights * shares).sum())
    if scale <= 0:
        raise OptionError(f"--epsilon {epsilon:g} leaves no mean sparsity to scale; give 1 or less.")
    return shares * (target * float(weights.sum()) / scale)
