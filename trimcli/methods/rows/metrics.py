"""Metrics of a pruned matrix's outputs B against the dense A (Beck et al. 2025): larger is better, all in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trimcli.registry import Entry, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.rows.quality import Outputs

SOURCE = "Beck et al. 2025, section 3"
_EPSILON = 1e-8
_MSE_FLOOR = 1e-10

QUALITIES = Registry("quality metric", "--qmetric", Entry)
quality = QUALITIES.register
"""Register the decorated metric of a whole matrix: Outputs -> a float64 scalar."""

ROW_QUALITIES = Registry("row metric", "--qmetric-dimwise", Entry)
row_quality = ROW_QUALITIES.register
"""Register the decorated row metric: Outputs -> float64 [D_out]."""


@quality("cosim_flat", source=SOURCE)
def cosim_flat(outputs: Outputs) -> Tensor:
    """Cosine of the flattened A and B."""
    return cosine(outputs.dot.sum(), outputs.dense.sqnorm.sum().sqrt(), outputs.sqnorm.sum().sqrt())


@quality("cosim_dim", source=SOURCE)
def cosim_dim(outputs: Outputs) -> Tensor:
    """Mean over rows of the row cosine."""
    return cosim_row(outputs).mean()


@quality("cosim_sample", source=SOURCE)
def cosim_sample(outputs: Outputs) -> Tensor:
    """Mean over columns (samples) of the column cosine."""
    pruned = outputs.pruned.double()
    dot = (outputs.dense.values * pruned).sum(dim=0).cpu()
    norm = pruned.square().sum(dim=0).sqrt().cpu()
    return cosine(dot, outputs.dense.column_norm, norm).mean()


@quality("mse", source=SOURCE)
def mse(outputs: Outputs) -> Tensor:
    """Minus the mean square error."""
    return -outputs.mse


# Rows are equally long, so the mean of the rows' means is the mean.
quality("mse_dim", source=SOURCE)(mse)


@quality("mae", source=SOURCE)
def mae(outputs: Outputs) -> Tensor:
    """Minus the mean absolute error."""
    return -(outputs.pruned.double() - outputs.dense.values).abs().mean().cpu()


@quality("snr", source=SOURCE)
def snr(outputs: Outputs) -> Tensor:
    """Signal-to-noise ratio in dB, infinite when the mean square error is below 1e-10."""
    if outputs.mse < _MSE_FLOOR:
        return outputs.mse.new_full((), math.inf)
    return _decibel(outputs.dense.sqnorm.sum() / outputs.pruned.numel(), outputs.mse)


@quality("psnr_flat", source=SOURCE)
def psnr_flat(outputs: Outputs) -> Tensor:
    """Peak signal-to-noise ratio over everything, in dB."""
    return _decibel(outputs.dense.row_peak.max(), outputs.mse)


@quality("psnr_dim", source=SOURCE)
def psnr_dim(outputs: Outputs) -> Tensor:
    """Mean over rows of the row's peak signal-to-noise ratio, in dB."""
    return psnr_row(outputs).mean()


@quality("psnr_sample", source=SOURCE)
def psnr_sample(outputs: Outputs) -> Tensor:
    """Mean over columns (samples) of the column's peak signal-to-noise ratio, in dB."""
    error = (outputs.pruned.double() - outputs.dense.values).square().mean(dim=0).cpu()
    return _decibel(outputs.dense.column_peak, error).mean()


@quality("pass", source=SOURCE)
def accept(outputs: Outputs) -> Tensor:
    """1 whatever the outputs: no step is better than another."""
    return outputs.dot.new_ones(())


@row_quality("cosim", source=SOURCE)
def cosim_row(outputs: Outputs) -> Tensor:
    """Cosine of each row."""
    return cosine(outputs.dot, outputs.dense.sqnorm.sqrt(), outputs.sqnorm.sqrt())


@row_quality("mse", source=SOURCE)
def mse_row(outputs: Outputs) -> Tensor:
    """Minus the mean square error of each row."""
    return -outputs.row_mse


@row_quality("psnr", source=SOURCE)
def psnr_row(outputs: Outputs) -> Tensor:
    """Peak signal-to-noise ratio of each row, in dB; minus infinity for a row of zeros."""
    return _decibel(outputs.dense.row_peak, outputs.row_mse)


def _decibel(signal: Tensor, error: Tensor) -> Tensor:
    return 10 * (signal / (error + _MSE_FLOOR)).log10()


def cosine(dot: Tensor, norm: Tensor, other: Tensor) -> Tensor:
    """The cosine of a dot product and two norms, in [-1, 1]."""
    return (dot / ((norm + _EPSILON) * (other + _EPSILON))).clamp(-1, 1)
