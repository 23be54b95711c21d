"""Grids of a few bits for the kept weights: a scale and a zero point for every group of a row's inputs.

As GPTQ's and SparseGPT's code has them: asymmetric, from the least to the greatest weight of the group, zero always
among them. Integer q stands for (q - zero) * scale, so a weight that goes to zero has zero's integer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Of scales: 16 bits with float32's range. The grid is made from the scale as stored.
SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Grid:
    """scales: bfloat16 [D_out, ceil(D_in / group_size)]. zeros: uint8, of that shape. Integers: 0..2^wbits - 1."""

    wbits: int
    group_size: int
    scales: Tensor
    zeros: Tensor

    @classmethod
    def empty(cls, wbits: int, group_size: int, shape: tuple[int, int], device: torch.device) -> "Grid":
        """The grid of a matrix [D_out, D_in] before any group's is known."""
        groups = shape[0], -(-shape[1] // group_size)
        scales = torch.zeros(groups, dtype=SCALE_DTYPE, device=device)
        return cls(wbits, group_size, scales, torch.zeros(groups, dtype=torch.uint8, device=device))

    @property
    def most(self) -> int:
        """The greatest integer."""
        return 2**self.wbits - 1

    def fit(self, group: int, weights: Tensor) -> None:
        """Set a group's grid from its weights, float32 [D_out, n]: from the least to the greatest, zero included."""
        least, greatest = weights.amin(dim=1).clamp_(max=0), weights.amax(dim=1).clamp_(min=0)
        nothing = least == greatest
        least, greatest = least.masked_fill(nothing, -1.0), greatest.masked_fill(nothing, 1.0)
        scales = ((greatest - least) / self.most).clamp_(min=torch.finfo(SCALE_DTYPE).tiny).to(SCALE_DTYPE)
        self.scales[:, group] = scales
        self.zeros[:, group] = (-least / scales.float()).round_().clamp_(0, self.most).to(torch.uint8)

    def nearest(self, weights: Tensor, columns: Tensor | int, rows: Tensor | None = None) -> Tensor:
        """The integers nearest to float32 weights, as floats: of a column [D_out], or [n] at `rows` and `columns`."""
        scales, zeros = self._at(columns, rows)
        return (weights / scales).round_().add_(zeros).clamp_(0, self.most)

    def values(self, integers: Tensor, columns: Tensor | int, rows: Tensor | None = None) -> Tensor:
        """What integers stand for, float32: those of a column [D_out], or [n] at `rows` and `columns`."""
        scales, zeros = self._at(columns, rows)
        return (integers - zeros).mul_(scales)

    def _at(self, columns: Tensor | int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        groups = columns // self.group_size
        scales = self.scales[:, groups] if rows is None else self.scales[rows, groups]
        zeros = self.zeros[:, groups] if rows is None else self.zeros[rows, groups]
        return scales.float(), zeros.float()
