"""A model whose pruned linears hold and multiply the packed form."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import ResourceError
from trimcli.files.masks import MaskFile
from trimcli.kernels.bitmap import build
from trimcli.kernels.bitmap.linear import bitmap_bytes, put_in_place
from trimcli.kernels.forms import pruned_names, was_pruned
from trimcli.model.skeleton import Skeleton


@dataclass(frozen=True)
class MadeSparse:
    """The linears that were replaced, and the fraction of all linears' weights that is zero."""

    names: tuple[str, ...]
    zeros: float


def make_sparse(skeleton: Skeleton, mask: MaskFile | None = None, *, progress: Progress = NO_PROGRESS) -> MadeSparse:
    """Put a SparseLinear in the place of every pruned linear of a skeleton, reading one dense matrix at a time.

    mask: laid over the weights. Values stay in their stored dtype where the compute dtype holds them all, and take the
    compute dtype else. A matrix that would not get smaller stays as it is.
    """
    recorded = None if mask else pruned_names(skeleton.checkpoint)
    names, zeros, weights = [], 0, 0
    with progress.task("loading sparse", len(skeleton.linears)) as step:
        for name, linear in skeleton.linears.items():
            weight = held(linear.read(skeleton.checkpoint), skeleton.dtype)
            if mask is not None and name in mask.names:
                weight = weight.masked_fill(~mask.keep(name), 0)
            kept = int(weight.count_nonzero())
            zeros, weights = zeros + linear.numel - kept, weights + linear.numel
            smaller = bitmap_bytes(linear.shape, kept, weight.itemsize) < linear.numel * skeleton.dtype.itemsize
            if smaller and was_pruned(name, 1 - kept / linear.numel, recorded):
                put_in_place(skeleton, linear, weight)
                names.append(name)
            step()
    return MadeSparse(tuple(names), zeros / max(weights, 1))


def sparsify(
    skeleton: Skeleton, mask: MaskFile | None, cache_dir: Path | None, progress: Progress = NO_PROGRESS
) -> MadeSparse:
    """`make_sparse` where its products can be had; else a warning that says why not, and nothing is replaced."""
    why = f"products from keep bits are the CPU's, and the device here is {skeleton.device}"
    if skeleton.device.type == "cpu":
        try:
            build.load(cache_dir)
            return make_sparse(skeleton, mask, progress=progress)
        except ResourceError as problem:
            why = str(problem).rstrip(".")
    progress.warn(f"{why}; pruned matrices are held dense.")
    return MadeSparse((), 0.0)


def held(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored weight in the dtype that its kept values are held in when inputs are of `dtype`."""
    return weight if torch.promote_types(weight.dtype, dtype) == dtype else weight.to(dtype)


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, those that are used twice counted once."""
    found = {id(one): one.nbytes for one in (*model.parameters(), *model.buffers()) if one.device.type != "meta"}
    return sum(found.values())
