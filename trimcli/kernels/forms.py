"""Weight matrices in the forms that sparse kernels read, and the module that multiplies with them.

`csr`: torch's compressed sparse rows with int32 indices, which MKL multiplies on a CPU in float32. `semi-structured`: 2
of 4 kept, in 16 bits, as torch packs it for a CUDA device's sparse tensor cores. Its layout is the backend's:
cuSPARSELt's is bound to its version and to the device's generation, CUTLASS's to devices of compute capability 8.
"""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from trimcli.errors import MismatchError, OptionError
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.documents import read_mark
from trimcli.files.tensors import dtype_name
from trimcli.kernels.timing import timed
from trimcli.model.empty import empty
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton

# What a matrix in a form is stored as: suffixes of its tensor's name.
CSR_PARTS = ("crow_indices", "col_indices", "values")
SEMI_PARTS = ("packed", "meta")
PARTS: dict[str, tuple[str, ...]] = {"csr": CSR_PARTS, "semi-structured": SEMI_PARTS}
# Trained weights are exactly zero now and then; more than this share of them was pruned.
FEW = 0.01


def pruned_names(checkpoint: Checkpoint) -> set[str] | None:
    """The linears that a directory's `trim.json` says were pruned; None where it says nothing."""
    recorded = read_mark(checkpoint.directory).get("linears")
    return set(recorded) if isinstance(recorded, Mapping) else None


def was_pruned(name: str, zeros: float, recorded: set[str] | None) -> bool:
    """Whether a linear was pruned: as recorded, else by its fraction of zeros. recorded: of `pruned_names`."""
    return zeros > FEW if recorded is None else name in recorded


class FormLinear(nn.Module):
    """y = x W^T + b with a sparse W: inputs [..., D_in] of any float dtype, outputs [..., D_out] of the same.

    form: W [D_out, D_in], CSR in float32 or float64, or semi-structured in the inputs' dtype. bias: [D_out] or None.
    """

    form: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # No parameter, and not called as the checkpoint's is: dropping a layer and loading it again leave it alone.
        self.register_buffer("form", weight)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The sparse W: some models ask their linears for its dtype or device."""
        return self.form

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [..., D_in] -> outputs [..., D_out]."""
        rows = inputs.reshape(-1, self.in_features)
        if self.form.layout == torch.sparse_csr:
            # Torch's own linear takes many times longer with a sparse weight on the right.
            there = rows.to(self.form.dtype)
            found = torch.mv(self.form, there[0]).unsqueeze(0) if len(rows) == 1 else (self.form @ there.T).T
            found = found.to(inputs.dtype) if self.bias is None else found.to(inputs.dtype) + self.bias
        else:
            found = nn.functional.linear(rows.contiguous(), self.form, self.bias)
        return found.reshape(*inputs.shape[:-1], self.out_features)


def to_csr(weight: Tensor) -> Tensor:
    """A dense matrix [D_out, D_in] as CSR of its dtype; zeros of either sign are left out."""
    with _no_beta_warning():
        found = weight.to_sparse_csr()
        rows, columns = found.crow_indices().int(), found.col_indices().int()
        return torch.sparse_csr_tensor(rows, columns, found.values(), weight.shape)


def csr_from_parts(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """CSR of stored tensors by the names in CSR_PARTS. Raises ValueError where they are no matrix of `shape`."""
    try:
        with _no_beta_warning():
            crow, columns, values = (parts[name] for name in CSR_PARTS)
            return torch.sparse_csr_tensor(crow, columns, values, shape, check_invariants=True)
    except RuntimeError as problem:
        raise ValueError(str(problem)) from None


def is_two_of_four(weight: Tensor) -> bool:
    """Whether every 4 consecutive inputs of a row have at most 2 weights that are not zero. weight: [D_out, D_in]."""
    d_out, d_in = weight.shape
    return d_in % 4 == 0 and bool(((weight.reshape(d_out, -1, 4) != 0).sum(dim=2) <= 2).all())


class SemiStructured:
    """How a CUDA device packs and multiplies 2:4 matrices (cusparselt or cutlass); OptionError where it cannot."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "cuda":
            what = f"semi-structured (2:4) matrices are packed on a CUDA GPU, and the device here is {device}"
            raise OptionError(f"{what}; run on a machine with one, or export --to csr.")
        if dtype not in (torch.float16, torch.bfloat16):
            what = f"kernels compute in 16 bits, and this model's weights are {dtype_name(dtype)}"
            raise OptionError(f"semi-structured (2:4) {what}; give --dtype bfloat16 or --dtype float16.")
        self.device, self.dtype = device, dtype
        self.capability = torch.cuda.get_device_capability(device)
        if torch.backends.cusparselt.is_available() and self.capability >= (8, 0):
            self.backend = "cusparselt"
        elif self.capability[0] == 8:
            self.backend = "cutlass"
        else:
            here = f"this GPU (compute capability {'.'.join(map(str, self.capability))}) and this build of torch"
            raise OptionError(f"{here} have no semi-structured (2:4) kernels; use another machine, or export --to csr.")

    @property
    def _kind(self) -> Any:
        return getattr(torch.sparse, f"SparseSemiStructuredTensor{self.backend.upper()}")

    def document(self) -> dict[str, Any]:
        """What the packed tensors are bound to."""
        version = torch.backends.cusparselt.version() if self.backend == "cusparselt" else None
        return {"backend": self.backend, "capability": list(self.capability), "cusparselt": version}

    def check(self, made: Mapping[str, Any], where: Any) -> None:
        """Raise MismatchError unless tensors packed as `made` says can be read here."""
        if made != self.document():
            what = f"{where} was packed for {made}, and this machine has {self.document()}"
            raise MismatchError(f"{what}; export it anew here.")

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether the kernels take matrices of this shape."""
        least = self._kind._DTYPE_SHAPE_CONSTRAINTS[self.dtype]
        return shape[0] % least.sparse_min_rows == 0 and shape[1] % least.sparse_min_cols == 0

    def pack(self, weight: Tensor) -> Tensor:
        """A 2:4 matrix [D_out, D_in], on any device, as a SparseSemiStructuredTensor on this one."""
        dense = weight.to(self.device, self.dtype).contiguous()
        with _no_beta_warning():
            return cast(Tensor, self._kind.from_dense(dense))

    def from_parts(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The same from stored tensors by the names in SEMI_PARTS."""
        there = {name: parts[name].to(self.device) if name in parts else None for name in SEMI_PARTS}
        absent = dict.fromkeys(("packed_t", "meta_t", "compressed_swizzled_bitmask"))
        with _no_beta_warning():
            return cast(Tensor, self._kind(shape=torch.Size(shape), **there, **absent))


def parts_of(sparse: Tensor) -> dict[str, Tensor]:
    """The tensors that a sparse matrix consists of, by the names they are stored under."""
    if sparse.layout == torch.sparse_csr:
        return {name: getattr(sparse, name)() for name in CSR_PARTS}
    found = {name: getattr(sparse, name) for name in SEMI_PARTS}
    return {name: part for name, part in found.items() if part is not None}


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes, sparse or dense."""
    if tensor.layout == torch.sparse_csr or isinstance(tensor, torch.sparse.SparseSemiStructuredTensor):
        return sum(part.nbytes for part in parts_of(tensor).values())
    return tensor.nbytes


def replace_linear(skeleton: Skeleton, linear: Matrix, weight: Tensor) -> None:
    """Put a FormLinear of the sparse `weight` [D_out, D_in] in the linear's place, with its bias."""
    parent, _, leaf = linear.name.rpartition(".")
    bias = cast(nn.Parameter | None, linear.module.bias)
    setattr(skeleton.model.get_submodule(parent), leaf, FormLinear(weight, bias))
    empty(linear.module)


def computed(sparse: Tensor) -> Tensor:
    """CSR in the dtype that its kernels compute in: float32 for 16-bit values."""
    if sparse.layout != torch.sparse_csr or sparse.dtype not in (torch.float16, torch.bfloat16):
        return sparse
    with _no_beta_warning():
        return sparse.float()


class Race(NamedTuple):
    """Median seconds of a product with one sample, dense and sparse."""

    dense: float
    sparse: float


def race(weight: Tensor, sparse: Tensor, dtype: torch.dtype) -> Race:
    """Time one input row through a matrix [D_out, D_in], dense in `dtype` and as CSR, in turn, on the CPU."""
    dense = weight.to(dtype).contiguous()
    inputs = torch.randn(1, weight.shape[1]).to(dtype)
    module = FormLinear(computed(sparse))
    with torch.no_grad():
        seconds = timed({"dense": lambda: nn.functional.linear(inputs, dense), "sparse": lambda: module(inputs)})
    return Race(**seconds)


def _no_beta_warning() -> AbstractContextManager[Any]:
    """Torch says of either form, once, that it may change; the versions it was written with lie beside it."""
    return warnings.catch_warnings(action="ignore")
