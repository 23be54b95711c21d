"""Quality of a pruned matrix: how close its outputs B = P V stay to the dense outputs A = W V, float32 [D_out, N]."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimcli.methods.ranking import row_blocks


class Dense:
    """Dense outputs A, and what derives from them alone, float64 on the CPU. sqnorm: [D_out], ||A_k||^2."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.sqnorm = _row_sums(values, values)[1]

    @cached_property
    def row_peak(self) -> Tensor:
        """The largest squared output of each row, [D_out]."""
        return self.values.abs().amax(dim=1).cpu().double().square()

    @cached_property
    def column_peak(self) -> Tensor:
        """The largest squared output of each column, [N]."""
        return self.values.abs().amax(dim=0).cpu().double().square()

    @cached_property
    def column_norm(self) -> Tensor:
        """The L2 norm of each column, [N]."""
        return self.values.double().square().sum(dim=0).sqrt().cpu()


@dataclass(frozen=True)
class Outputs:
    """Outputs compared. pruned: B, on A's device. dot: <A_k, B_k>, sqnorm: ||B_k||^2, float64 [D_out] on the CPU."""

    dense: Dense
    pruned: Tensor
    dot: Tensor
    sqnorm: Tensor

    @cached_property
    def row_error(self) -> Tensor:
        """Sum of each row's squared errors, float64 [D_out]: from the outputs, since what the two sums give cancels."""
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


def compare(dense: Dense, pruned: Tensor) -> Outputs:
    """Take the row sums of A and B that the metrics start from. Raises ValueError where B has another shape than A."""
    if pruned.shape != dense.values.shape:
        raise ValueError(f"pruned outputs {list(pruned.shape)} are not like the dense {list(dense.values.shape)}.")
    return Outputs(dense, pruned, *_row_sums(dense.values, pruned))


def _row_sums(dense: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """<A_k, B_k> and ||B_k||^2 on the CPU, float64: the search needs finer differences than float32 resolves."""
    sums = torch.empty((2, dense.shape[0]), dtype=torch.float64, device=dense.device)
    for rows in row_blocks(dense, parts=2):
        wide = pruned[rows].double()
        torch.linalg.vecdot(dense[rows].double(), wide, out=sums[0, rows])
        torch.linalg.vecdot(wide, wide, out=sums[1, rows])
    return tuple(sums.cpu())
