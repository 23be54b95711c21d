"""The operator `trimcli::bitmap_linear`, its CPU implementation in operator.cpp: y = x W^T + b from the packed form."""

import torch
from torch import Tensor

NAME = "trimcli::bitmap_linear"

torch.library.define(
    NAME,
    "(Tensor inputs, Tensor keep, Tensor offsets, Tensor values, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake(NAME)
def _fake(inputs: Tensor, keep: Tensor, offsets: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty(inputs.shape[0], keep.shape[0])


def bitmap_linear(inputs: Tensor, keep: Tensor, offsets: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """Inputs [n, D_in] -> outputs [n, D_out] of the same dtype, summed in float32. Call `build.load` before.

    keep: uint8 [D_out, ceil(D_in / 8)], most significant bit first. offsets: int64 [D_out + 1], where each row's kept
    values begin, which nobody checks against the bits. values: [n_kept], float32, bfloat16 or float16. bias: [D_out].
    """
    found: Tensor = torch.ops.trimcli.bitmap_linear(inputs, keep, offsets, values, bias)
    return found
