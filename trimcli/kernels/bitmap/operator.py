"""The operator `trimcli::bitmap_linear`: y = x W^T + b from the packed form, by operator.cpp and gpu.py."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from trimcli.errors import ResourceError, first_line

NAME = "trimcli::bitmap_linear"

torch.library.define(
    NAME,
    "(Tensor inputs, Tensor keep, Tensor offsets, Tensor values, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake(NAME)
def _fake(inputs: Tensor, keep: Tensor, offsets: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], keep.shape[0])


@torch.library.impl(NAME, "cuda")
def _cuda(inputs: Tensor, keep: Tensor, offsets: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = _gpu().multiply(inputs.reshape(-1, inputs.shape[-1]), keep, offsets, values, bias)
    return found.reshape(*inputs.shape[:-1], len(keep))


def bitmap_linear(inputs: Tensor, keep: Tensor, offsets: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """Inputs [..., D_in] -> outputs [..., D_out] of the same dtype, summed in float32.

    On a CPU call `build.load` before; on a CUDA device ResourceError is raised where triton is lacking.

    keep: uint8 [D_out, ceil(D_in / 8)], most significant bit first. offsets: int64 [D_out + 1], where each row's kept
    values begin, which nobody checks against the bits. values: [n_kept], float32, bfloat16 or float16. bias: [D_out].
    """
    found: Tensor = torch.ops.trimcli.bitmap_linear(inputs, keep, offsets, values, bias)
    return found


def try_on_gpu(device: torch.device) -> None:
    """Multiply once on a CUDA device, which compiles. Raises ResourceError where that is not to be had."""
    keep, offsets, values = torch.tensor([[128]], dtype=torch.uint8), torch.tensor([0, 1]), torch.ones(1)
    multiply = _gpu().multiply
    try:
        multiply(values[None].to(device), keep.to(device), offsets.to(device), values.to(device))
    except Exception as problem:  # of triton, of the compiler that it calls, of the driver
        raise ResourceError(_unusable(first_line(problem))) from None


def _gpu() -> Any:
    """The module of the products on CUDA devices."""
    try:
        return import_module("trimcli.kernels.bitmap.gpu")
    except ImportError as problem:
        raise ResourceError(_unusable(first_line(problem))) from None


def _unusable(why: str) -> str:
    what = "the sparse products of CUDA devices cannot be compiled here"
    return f"{what}: {why.rstrip('.')}; install triton and a C compiler."
