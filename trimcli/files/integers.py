"""Kept weights of a few bits as packed checkpoints hold them: their grid's integers, by the byte.

keep: bool, of the matrix as stored, [D_in, D_out] where `transposed`; kept weights are in its row order.
"""

import torch
from torch import Tensor

from trimcli.files.tensors import TensorSpec, bit_view
from trimcli.methods.updates.grid import SCALE_DTYPE, Grid


def grid_specs(shape: tuple[int, int], group_size: int) -> dict[str, TensorSpec]:
    """What the grid of a matrix [D_out, D_in] is stored as: scales and zeros."""
    groups = shape[0], -(-shape[1] // group_size)
    return {"scales": TensorSpec(SCALE_DTYPE, groups), "zeros": TensorSpec(torch.uint8, groups)}


def integer_bytes(kept: int, wbits: int) -> int:
    """Bytes of so many integers."""
    return -(-kept * wbits // 8)


def integers_of(values: Tensor, keep: Tensor, grid: Grid, transposed: bool) -> Tensor:
    """The integers, packed, of kept weights [n_kept]. Raises ValueError where these are no values of the grid."""
    outputs, inputs = _places(keep, transposed)
    found, bits = grid.nearest(values.float(), inputs, outputs), torch.from_numpy(bit_view(values.contiguous()))
    integers, unknown = found.to(torch.uint8), torch.ones_like(found, dtype=torch.bool)
    # Rounded to the stored dtype, a weight of 8 bits may lie nearer to the next integer than to its own.
    for step in (0, 1, -1):
        tried = (found + step).clamp_(0, grid.most)
        made = torch.from_numpy(bit_view(grid.values(tried, inputs, outputs).to(values.dtype)))
        fits = unknown & (made == bits)
        integers, unknown = torch.where(fits, tried.to(torch.uint8), integers), unknown & ~fits
    if bool(unknown.any()):
        raise ValueError("the kept weights are no values of their grid.")
    if grid.wbits == 8:
        return integers
    padded = torch.zeros(2 * integer_bytes(len(integers), 4), dtype=torch.uint8)
    padded[: len(integers)] = integers
    return padded[0::2] << 4 | padded[1::2]


def values_of(packed: Tensor, keep: Tensor, grid: Grid, transposed: bool, dtype: torch.dtype) -> Tensor:
    """The kept weights [n_kept] of `integers_of`. Raises ValueError where there are more or fewer."""
    outputs, inputs = _places(keep, transposed)
    if len(packed) != integer_bytes(len(outputs), grid.wbits):
        raise ValueError(f"the keep bits call for {len(outputs)} integers, which {len(packed)} bytes are not.")
    integers = packed if grid.wbits == 8 else torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    return grid.values(integers[: len(outputs)], inputs, outputs).to(dtype)


def _places(keep: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """The output and the input of every kept weight [n_kept]."""
    rows, columns = keep.nonzero(as_tuple=True)
    return (columns, rows) if transposed else (rows, columns)
