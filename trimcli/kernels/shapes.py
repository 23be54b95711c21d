"""Products with one input row, dense and sparse, timed against each other and against the memory's bandwidth."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimcli.kernels import forms
from trimcli.kernels.bitmap.linear import SparseLinear
from trimcli.kernels.timing import CPU, REPEATS, timed

# Fractions of zeros that are tried for the one from which on sparsity pays.
TRIED = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class ShapeRace:
    """One matrix of the model for all of its shape: seconds and bytes by form (dense, bitmap, csr).

    count: matrices of this shape. zeros: fraction of this one's weights. floor: form -> seconds in which this device
    copies as many bytes. csr: on a CPU alone.
    """

    shape: tuple[int, int]
    count: int
    zeros: float
    seconds: Mapping[str, float]
    nbytes: Mapping[str, int]
    floor: Mapping[str, float]


def race_shape(
    weight: Tensor,
    dtype: torch.dtype,
    count: int,
    bandwidth: float,
    repeats: int = REPEATS,
    *,
    csr: bool = True,
    device: torch.device = CPU,
) -> ShapeRace:
    """Time one input row of `dtype` through a matrix [D_out, D_in], on the CPU as stored, in the forms of `device`."""
    dense = weight.to(device, dtype).contiguous()
    inputs = torch.randn(1, weight.shape[1]).to(device, dtype)
    bitmap = SparseLinear.of(weight).to(device)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")  # as a model calls it, like bitmap
    linear.weight = nn.Parameter(dense, requires_grad=False)
    runs: dict[str, Callable[[], object]] = {"dense": lambda: linear(inputs), "bitmap": lambda: bitmap(inputs)}
    nbytes = {"dense": dense.nbytes, "bitmap": bitmap.nbytes}
    if csr:
        rows = forms.FormLinear(forms.computed(forms.to_csr(weight)))
        runs["csr"], nbytes["csr"] = (lambda: rows(inputs)), forms.stored_bytes(rows.weight)
    zeros = 1 - len(bitmap.values) / weight.numel()
    with torch.no_grad():
        seconds = timed(runs, repeats, device)
    floor = {form: size / bandwidth for form, size in nbytes.items()}
    return ShapeRace((weight.shape[0], weight.shape[1]), count, zeros, seconds, nbytes, floor)


def random_matrix(shape: tuple[int, int], zeros: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A matrix [D_out, D_in] with zeros in random places."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight.masked_fill_(torch.rand(shape, generator=generator) < zeros, 0).to(dtype)


def break_even(
    shape: tuple[int, int], stored: torch.dtype, dtype: torch.dtype, repeats: int = REPEATS, device: torch.device = CPU
) -> float | None:
    """The least fraction of zeros in TRIED from which on a matrix of this shape is faster as keep bits, if any."""
    found = None
    for zeros in reversed(TRIED):
        weight = random_matrix(shape, zeros, stored)
        seconds = race_shape(weight, dtype, 1, 1.0, repeats, csr=False, device=device).seconds
        if seconds["bitmap"] >= seconds["dense"]:
            break
        found = zeros
    return found
