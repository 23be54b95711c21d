"""A model whose pruned linears hold and multiply the packed form."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import OptionError, ResourceError
from trimcli.files.masks import MaskFile
from trimcli.kernels.bitmap import build
from trimcli.kernels.bitmap.linear import SparseLinear, bitmap_bytes, put_in_place
from trimcli.kernels.bitmap.operator import try_on_gpu
from trimcli.kernels.forms import FormLinear, SemiStructured, is_two_of_four, pruned_names, replace_linear, was_pruned
from trimcli.kernels.timing import timed
from trimcli.model.skeleton import Skeleton


@dataclass(frozen=True)
class MadeSparse:
    """The linears that were replaced, and the fraction of all linears' weights that is zero."""

    names: tuple[str, ...]
    zeros: float


class TwoOfFour:
    """Semi-structured forms of 2:4 matrices, of the shapes of which a device multiplies them fastest."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._wins: dict[tuple[int, int], bool] = {}
        self._packer = None
        with contextlib.suppress(OptionError):
            self._packer = SemiStructured(device, dtype)

    def form(self, weight: Tensor) -> Tensor | None:
        """A matrix [D_out, D_in] on the CPU, semi-structured; None where it is not 2:4 or another form is faster."""
        packer, shape = self._packer, (weight.shape[0], weight.shape[1])
        if packer is None or not packer.fits(shape) or self._wins.get(shape) is False or not is_two_of_four(weight):
            return None
        packed = packer.pack(weight)
        if shape not in self._wins:
            self._wins[shape] = self._is_fastest(packed, weight)
        return packed if self._wins[shape] else None

    @torch.no_grad()
    def _is_fastest(self, packed: Tensor, weight: Tensor) -> bool:
        """Of one input row's products, on the device of `packed`."""
        dense = weight.to(packed.device, packed.dtype)
        inputs = torch.ones(1, weight.shape[1], device=packed.device, dtype=packed.dtype)
        semi, bitmap = FormLinear(packed), SparseLinear.of(weight.to(packed.dtype)).to(packed.device)
        runs = {"semi": lambda: semi(inputs), "bitmap": lambda: bitmap(inputs), "dense": lambda: inputs @ dense.T}
        seconds = timed(runs, device=packed.device)
        return min(seconds, key=seconds.__getitem__) == "semi"


def make_sparse(
    skeleton: Skeleton,
    mask: MaskFile | None = None,
    *,
    progress: Progress = NO_PROGRESS,
    two_of_four: TwoOfFour | None = None,
) -> MadeSparse:
    """Put a SparseLinear in the place of every pruned linear of a skeleton, reading one dense matrix at a time.

    mask: laid over the weights. Values stay in their stored dtype where the compute dtype holds them all, and take the
    compute dtype else. A matrix that would not get smaller stays as it is. two_of_four: where it has a form, that is
    put in place instead.
    """
    recorded = None if mask else pruned_names(skeleton.checkpoint)
    names, zeros, weights = [], 0, 0
    matrices = skeleton.matrices(mask.names if mask else recorded or ())
    with progress.task("loading sparse", len(matrices)) as step:
        for name, linear in matrices.items():
            weight = held(linear.read(skeleton.checkpoint), skeleton.dtype)
            if mask is not None and name in mask.names:
                weight = weight.masked_fill(~mask.keep(name), 0)
            kept = int(weight.count_nonzero())
            zeros, weights = zeros + linear.numel - kept, weights + linear.numel
            smaller = bitmap_bytes(linear.shape, kept, weight.itemsize) < linear.numel * skeleton.dtype.itemsize
            if smaller and linear.replaceable and was_pruned(name, 1 - kept / linear.numel, recorded):
                semi_structured = two_of_four.form(weight) if two_of_four else None
                if semi_structured is None:
                    put_in_place(skeleton, linear, weight)
                else:
                    replace_linear(skeleton, linear, semi_structured)
                names.append(name)
            step()
    return MadeSparse(tuple(names), zeros / max(weights, 1))


def sparsify(
    skeleton: Skeleton,
    mask: MaskFile | None,
    cache_dir: Path | None,
    progress: Progress = NO_PROGRESS,
    *,
    bitmap_alone: bool = False,
) -> MadeSparse:
    """`make_sparse` where its products can be had; else a warning that says why not, and nothing is replaced.

    bitmap_alone: without the semi-structured products that 2:4 matrices have on a CUDA device where they are faster.
    """
    device = skeleton.device
    try:
        if device.type == "cuda":
            try_on_gpu(device)
        elif device.type == "cpu":
            build.load(cache_dir)
        else:
            raise ResourceError(f"there are no products from keep bits for the device {device}.")
    except ResourceError as problem:
        progress.warn(f"{str(problem).rstrip('.')}; pruned matrices are held dense.")
        return MadeSparse((), 0.0)
    two_of_four = TwoOfFour(device, skeleton.dtype) if device.type == "cuda" and not bitmap_alone else None
    return make_sparse(skeleton, mask, progress=progress, two_of_four=two_of_four)


def held(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored weight in the dtype that its kept values are held in when inputs are of `dtype`."""
    return weight if torch.promote_types(weight.dtype, dtype) == dtype else weight.to(dtype)


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, those that are used twice counted once."""
    found = {id(one): one.nbytes for one in (*model.parameters(), *model.buffers()) if one.device.type != "meta"}
    return sum(found.values())
