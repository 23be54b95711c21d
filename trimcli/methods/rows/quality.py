"""Quality of a pruned matrix: how close its outputs B stay to the dense outputs A (Beck et al. 2025).

A = W V and B = P V are float32 [D_out, N]; every metric is computed in float64, and larger is better. Metrics
of the whole matrix return one number, row metrics one per row. Cosines divide by (norm + 1e-8) and lie in
[-1, 1].

The cosines of rows and of the whole follow from two numbers per row, <A_k, B_k> and ||B_k||^2, besides what
belongs to A alone; the errors from one, ||A_k - B_k||^2. Each is taken once for all metrics.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from trimcli.methods.ranking import row_blocks
from trimcli.options import one_of

_EPSILON = 1e-8
_MSE_FLOOR = 1e-10

_Metric = TypeVar("_Metric", "Quality", "RowQuality")


class Dense:
    """Dense outputs A with what is derived from them alone.

    values: float32 [D_out, N]. sqnorm: float64 [D_out] on the CPU, ||A_k||^2.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.sqnorm = _row_sums(values, values)[1]

    @cached_property
    def row_peak(self) -> Tensor:
        """The largest squared output of each row, float64 [D_out] on the CPU."""
        return self.values.abs().amax(dim=1).cpu().double().square()

    @cached_property
    def column_peak(self) -> Tensor:
        """The largest squared output of each column, float64 [N] on the CPU."""
        return self.values.abs().amax(dim=0).cpu().double().square()

    @cached_property
    def column_norm(self) -> Tensor:
        """The L2 norm of each column, float64 [N] on the CPU."""
        return self.values.double().square().sum(dim=0).sqrt().cpu()


@dataclass(frozen=True)
class Outputs:
    """Dense and pruned outputs of one matrix, compared.

    dense: A. pruned: B, float32 [D_out, N] on A's device.
    dot: <A_k, B_k>, sqnorm: ||B_k||^2, both float64 [D_out] on the CPU.
    """

    dense: Dense
    pruned: Tensor
    dot: Tensor
    sqnorm: Tensor

    @cached_property
    def row_error(self) -> Tensor:
        """Sum of each row's squared errors, float64 [D_out] on the CPU.

        From the outputs: ||A_k||^2 - 2 <A_k, B_k> + ||B_k||^2 cancels where B is close to A.
        """
        error = torch.empty(len(self.dot), dtype=torch.float64, device=self.pruned.device)
        for rows in row_blocks(self.pruned, parts=2):
            wide = self.pruned[rows].double().sub_(self.dense.values[rows])
            torch.linalg.vecdot(wide, wide, out=error[rows])
        return error.cpu()

    @property
    def row_mse(self) -> Tensor:
        """Mean square error of each row, float64 [D_out]."""
        return self.row_error / self.pruned.shape[1]

    @property
    def mse(self) -> Tensor:
        """Mean square error, a float64 scalar."""
        return self.row_error.sum() / self.pruned.numel()

    @property
    def row_cosine(self) -> Tensor:
        """Cosine of each row, float64 [D_out]."""
        return _cosine(self.dot, self.dense.sqnorm.sqrt(), self.sqnorm.sqrt())


def compare(dense: Dense, pruned: Tensor) -> Outputs:
    """Take the row sums of A and B that the metrics start from.

    pruned: float32 [D_out, N], on the device of `dense`. Raises ValueError for another shape than A's.
    """
    if pruned.shape != dense.values.shape:
        raise ValueError(f"pruned outputs {list(pruned.shape)} are not like the dense {list(dense.values.shape)}.")
    return Outputs(dense, pruned, *_row_sums(dense.values, pruned))


Quality = Callable[[Outputs], Tensor]
RowQuality = Callable[[Outputs], Tensor]

_qualities: dict[str, Quality] = {}
_row_qualities: dict[str, RowQuality] = {}


def register_quality(name: str) -> Callable[[Quality], Quality]:
    """Enter the decorated metric of a whole matrix, Outputs -> float64 scalar, in the registry as `name`.

    Raises ValueError when the name is taken.
    """
    return _enter(_qualities, name)


def register_row_quality(name: str) -> Callable[[RowQuality], RowQuality]:
    """Enter the decorated row metric, Outputs -> float64 [D_out], in the registry as `name`.

    Raises ValueError when the name is taken.
    """
    return _enter(_row_qualities, name)


def quality_names() -> list[str]:
    """Names of the metrics of a whole matrix, the default first."""
    return list(_qualities)


def row_quality_names() -> list[str]:
    """Names of the row metrics, the default first."""
    return list(_row_qualities)


def quality_function(name: str) -> Quality:
    """The metric of a whole matrix called `name`. Raises OptionError for an unknown name."""
    return _qualities[one_of("--qmetric", name, _qualities)]


def row_quality_function(name: str) -> RowQuality:
    """The row metric called `name`. Raises OptionError for an unknown name."""
    return _row_qualities[one_of("--qmetric-dimwise", name, _row_qualities)]


def _enter(registry: dict[str, _Metric], name: str) -> Callable[[_Metric], _Metric]:
    def enter(metric: _Metric) -> _Metric:
        if name in registry:
            raise ValueError(f"a quality metric named {name!r} is registered already; choose another name.")
        registry[name] = metric
        return metric

    return enter


@register_quality("cosim_flat")
def cosim_flat(outputs: Outputs) -> Tensor:
    """Cosine of the flattened A and B."""
    return _cosine(outputs.dot.sum(), outputs.dense.sqnorm.sum().sqrt(), outputs.sqnorm.sum().sqrt())


@register_quality("cosim_dim")
def cosim_dim(outputs: Outputs) -> Tensor:
    """Mean over rows of the row cosine."""
    return outputs.row_cosine.mean()


@register_quality("cosim_sample")
def cosim_sample(outputs: Outputs) -> Tensor:
    """Mean over columns (samples) of the column cosine."""
    pruned = outputs.pruned.double()
    dot = (outputs.dense.values * pruned).sum(dim=0).cpu()
    norm = pruned.square().sum(dim=0).sqrt().cpu()
    return _cosine(dot, outputs.dense.column_norm, norm).mean()


@register_quality("mse")
def mse(outputs: Outputs) -> Tensor:
    """Minus the mean square error."""
    return -outputs.mse


# Rows are equally long, so the mean of the rows' means is the mean.
register_quality("mse_dim")(mse)


@register_quality("mae")
def mae(outputs: Outputs) -> Tensor:
    """Minus the mean absolute error."""
    return -(outputs.pruned.double() - outputs.dense.values).abs().mean().cpu()


@register_quality("snr")
def snr(outputs: Outputs) -> Tensor:
    """Signal-to-noise ratio in dB, infinite when the mean square error is below 1e-10."""
    if outputs.mse < _MSE_FLOOR:
        return torch.full_like(outputs.mse, torch.inf)
    return _decibel(outputs.dense.sqnorm.sum() / outputs.pruned.numel(), outputs.mse)


@register_quality("psnr_flat")
def psnr_flat(outputs: Outputs) -> Tensor:
    """Peak signal-to-noise ratio over everything, in dB."""
    return _decibel(outputs.dense.row_peak.max(), outputs.mse)


@register_quality("psnr_dim")
def psnr_dim(outputs: Outputs) -> Tensor:
    """Mean over rows of the row's peak signal-to-noise ratio, in dB."""
    return psnr_row(outputs).mean()


@register_quality("psnr_sample")
def psnr_sample(outputs: Outputs) -> Tensor:
    """Mean over columns (samples) of the column's peak signal-to-noise ratio, in dB."""
    error = (outputs.pruned.double() - outputs.dense.values).square().mean(dim=0).cpu()
    return _decibel(outputs.dense.column_peak, error).mean()


@register_quality("pass")
def accept(outputs: Outputs) -> Tensor:
    """1 whatever the outputs: no step is better than another."""
    return torch.ones((), dtype=torch.float64)


@register_row_quality("cosim")
def cosim_row(outputs: Outputs) -> Tensor:
    """Cosine of each row."""
    return outputs.row_cosine


@register_row_quality("mse")
def mse_row(outputs: Outputs) -> Tensor:
    """Minus the mean square error of each row."""
    return -outputs.row_mse


@register_row_quality("psnr")
def psnr_row(outputs: Outputs) -> Tensor:
    """Peak signal-to-noise ratio of each row, in dB; minus infinity for a row of zeros."""
    return _decibel(outputs.dense.row_peak, outputs.row_mse)


def _cosine(dot: Tensor, norm: Tensor, other: Tensor) -> Tensor:
    return (dot / ((norm + _EPSILON) * (other + _EPSILON))).clamp(-1, 1)


def _decibel(signal: Tensor, error: Tensor) -> Tensor:
    return 10 * torch.log10(signal / (error + _MSE_FLOOR))


def _row_sums(dense: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """<A_k, B_k> and ||B_k||^2, float64 [D_out] on the CPU.

    In float64, because the search divides differences of qualities by their range, which may be no wider than
    float32 resolves. In blocks of rows, so that the converted copies stay small.
    """
    sums = torch.empty((2, dense.shape[0]), dtype=torch.float64, device=dense.device)
    for rows in row_blocks(dense, parts=2):
        wide = pruned[rows].double()
        torch.linalg.vecdot(dense[rows].double(), wide, out=sums[0, rows])
        torch.linalg.vecdot(wide, wide, out=sums[1, rows])
    dot, sqnorm = sums.cpu()
    return dot, sqnorm
