"""A linear that holds its weight as keep bits, row offsets and kept values, and multiplies with them as they are."""

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from trimcli.files.packed import decode, kept_values
from trimcli.kernels.bitmap.operator import bitmap_linear
from trimcli.methods import masks
from trimcli.model.empty import empty
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton

BITS_SET = np.array([byte.bit_count() for byte in range(256)], np.uint8)


def row_offsets(keep: Tensor) -> Tensor:
    """Where the kept values of each row begin, and the last ones end: int64 [D_out + 1]. keep: packed uint8."""
    counts = BITS_SET[keep.numpy()].sum(axis=1, dtype=np.int64)
    return torch.from_numpy(np.concatenate(([0], np.cumsum(counts))))


def bitmap_bytes(shape: tuple[int, int], kept: int, itemsize: int) -> int:
    """Bytes of a matrix [D_out, D_in] in this form."""
    d_out, d_in = shape
    return d_out * -(-d_in // 8) + 8 * (d_out + 1) + kept * itemsize


class SparseLinear(nn.Module):
    """y = x W^T + b: inputs [..., D_in] of any float dtype, outputs [..., D_out] of the same.

    keep: uint8 [D_out, ceil(D_in / 8)] as `masks.pack` gives it; values: the kept weights [n_kept] in row order,
    float32, bfloat16 or float16; bias: [D_out] or None. Raises ValueError where bits and values do not go together.
    """

    keep: Tensor
    offsets: Tensor
    values: Tensor
    bias: nn.Parameter | None

    def __init__(self, keep: Tensor, values: Tensor, in_features: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, len(keep)
        offsets = row_offsets(keep)
        if keep.shape[1] != -(-in_features // 8) or int(offsets[-1]) != len(values):
            what = f"{len(values)} values for {int(offsets[-1])} bits set in rows of {keep.shape[1]} bytes"
            raise ValueError(f"{what} are no matrix with {in_features} inputs.")
        beyond = 0xFF >> in_features % 8 if in_features % 8 else 0
        if bool((keep[:, -1] & beyond).any()):
            raise ValueError(f"bits are set beyond the {in_features} inputs.")
        self.register_buffer("keep", keep.contiguous())
        self.register_buffer("offsets", offsets)
        self.register_buffer("values", values.contiguous())
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, weight: Tensor, bias: nn.Parameter | None = None) -> "SparseLinear":
        """The same of a dense matrix [D_out, D_in] on the CPU, its zeros left out."""
        keep = weight != 0
        return cls(masks.pack(keep), kept_values(weight, keep), weight.shape[1], bias)

    @property
    def weight(self) -> Tensor:
        """[D_out, D_in], decoded anew on every use: for code that reaches around the module."""
        dense = decode(self.keep.cpu(), self.values.cpu(), self.in_features)
        return dense.to(self.values.device)

    @property
    def nbytes(self) -> int:
        """Bytes of keep bits, offsets and values."""
        return self.keep.nbytes + self.offsets.nbytes + self.values.nbytes

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [..., D_in] -> outputs [..., D_out]."""
        # Not by attributes: a module finds each of those by a search, which tells where one token is multiplied.
        held = self._buffers
        return bitmap_linear(inputs, held["keep"], held["offsets"], held["values"], self._parameters["bias"])  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """As nn.Linear's, and how much is kept."""
        kept = f"kept={len(self.values)}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kept}"


def put_in_place(skeleton: Skeleton, linear: Matrix, weight: Tensor) -> None:
    """Put a SparseLinear of `weight` [D_out, D_in] in the linear's place, with its bias."""
    parent, _, leaf = linear.name.rpartition(".")
    bias = cast(nn.Parameter | None, linear.module.bias)
    module = SparseLinear.of(weight, bias)
    for name, buffer in module.named_buffers():
        setattr(module, name, buffer.to(skeleton.device))
    setattr(skeleton.model.get_submodule(parent), leaf, module)
    empty(linear.module)
