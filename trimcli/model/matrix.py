"""One prunable matrix, however its module and its checkpoint hold it.

Everything that prunes sees a matrix as [D_out, D_in]: rows are output features. How that lies in the checkpoint's
tensor is told by `within` alone, and how in the loaded parameter by `inside`: views, so that what is written through
them arrives.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimcli.errors import InputError
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.names import inside_layer


class Joined(NamedTuple):
    """Where a matrix of the checkpoint's lies in a parameter [E, ., D_in] that several of them are joined to."""

    expert: int
    start: int
    stop: int


class Piece(NamedTuple):
    """A matrix (D_out, D_in) of a checkpoint's tensor that becomes a part of one parameter, and where it lies in that.

    place, transposed: where it lies in its own tensor, as of a `Matrix`.
    """

    key: str
    shape: tuple[int, int]
    joined: Joined
    place: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that can be pruned; a `linear` in files, options and messages.

    name: full module name. module: what is called with its inputs, and holds it in its parameter `parameter_name`.
    key: the checkpoint tensor that it lies in, None where only a config was read. place: which matrix of a stack
    [E, ., .] it is, None where the tensor holds no other. transposed: whether it is stored as [D_in, D_out], as
    transformers' `Conv1D` and some stacked experts are. A convolution of single places is [D_out, D_in, 1, 1] there.
    joined: where it is once loaded, for what is joined with others then. routed: whether a router chooses the tokens
    that reach it.
    """

    name: str
    module: nn.Module
    d_out: int
    d_in: int
    key: str | None
    transposed: bool = False
    place: int | None = None
    parameter_name: str = "weight"
    joined: Joined | None = None
    routed: bool = False

    @property
    def expert(self) -> int | None:
        """Which expert's it is of those in the loaded parameter; None where that holds no other matrix."""
        return self.place if self.joined is None else self.joined.expert

    @property
    def stacked(self) -> bool:
        """Whether its loaded parameter holds other matrices, too, so that no module is called for it alone."""
        return self.expert is not None

    @property
    def replaceable(self) -> bool:
        """Whether a module is called with inputs [..., D_in] for it alone, so that another can take its place."""
        return not (self.stacked or isinstance(self.module, nn.Conv2d))

    @property
    def shape(self) -> tuple[int, int]:
        """(D_out, D_in)."""
        return self.d_out, self.d_in

    @property
    def numel(self) -> int:
        """How many weights."""
        return self.d_out * self.d_in

    def within(self, tensor: Tensor) -> Tensor:
        """The view [D_out, D_in] of the matrix in a tensor such as the checkpoint's."""
        own = tensor if self.place is None else tensor[self.place]
        own = own.mT if self.transposed else own
        return own if own.ndim == 2 else own.view(len(own), -1)

    def inside(self, tensor: Tensor) -> Tensor:
        """The view [D_out, D_in] of the matrix in a tensor of the loaded parameter's form."""
        if self.joined is None:
            return self.within(tensor)
        return tensor[self.joined.expert, self.joined.start : self.joined.stop]

    @property
    def parameter(self) -> Tensor:
        """The loaded tensor that it lies in."""
        found: Tensor = getattr(self.module, self.parameter_name).data
        return found

    @property
    def weight(self) -> Tensor:
        """The loaded weight [D_out, D_in], a view: what is written to it is written to the module."""
        return self.inside(self.parameter)

    def tokens(self, inputs: Tensor) -> Tensor:
        """What its module is given as tokens [..., D_in]: of maps [n, D_in, H, W] the places that it reads."""
        if not isinstance(self.module, nn.Conv2d):
            return inputs
        down, across = self.module.stride
        return inputs[..., ::down, ::across].flatten(-2).mT

    def write(self, weight: Tensor | None, keep: Tensor) -> None:
        """Make the loaded matrix sparse: other values [D_out, D_in] where given, zero outside `keep`, bool likewise."""
        if weight is not None:
            self.weight.copy_(weight)
        self.mask(keep)

    def mask(self, keep: Tensor | None) -> None:
        """Zero the loaded weight where `keep`, bool [D_out, D_in] on any device, is False."""
        if keep is not None:
            self.weight.masked_fill_(~keep.to(self.parameter.device), 0)

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The weight [D_out, D_in] as stored: its dtype, on the CPU. Raises InputError on NaN or infinity."""
        if self.key is None:
            raise InputError(f"{checkpoint.directory} has no weights for {self.name}; give a directory with them.")
        return self.within(finite(checkpoint.load(self.key), self.key, checkpoint))

    def replaced(self, tensor: Tensor, weight: Tensor) -> Tensor:
        """A copy of a tensor such as the checkpoint's or the module's, with `weight` [D_out, D_in] in its place."""
        copy = tensor.clone()
        self.within(copy).copy_(weight)
        return copy


def matrices_in(
    layer: nn.Module,
    prefix: str,
    key_of: Callable[[str], str | None],
    *,
    stored: bool,
    dense: Collection[str] = (),
    experts: Collection[int] = (),
    pieces: Mapping[str, Sequence[Piece]] | None = None,
) -> Iterator[Matrix]:
    """The matrices of a decoder layer, by full name `prefix`, in module order, but for the `dense` parameters.

    key_of: parameter name -> checkpoint key, None for what is assembled from several tensors, which is no matrix where
    there is a checkpoint: `stored`. experts: how many the config speaks of. pieces: of what is assembled and known.
    """
    lists = _expert_lists(layer, experts)
    for name, module in layer.named_modules():
        full = f"{prefix}.{name}"
        key = key_of(f"{full}.weight")
        made = matrix_of(full, module, key, routed=any(name.startswith(f"{one}.") for one in lists))
        if made is None:
            for matrix in _stacked(prefix, full, module, key_of, experts, pieces or {}):
                if f"{full}.{matrix.parameter_name}" not in dense:
                    yield matrix
        elif (key is not None or not stored) and f"{full}.weight" not in dense:
            yield made


def matrix_of(name: str, module: nn.Module, key: str | None, *, routed: bool = False) -> Matrix | None:
    """The matrix that a linear or a convolution of single places has as its `weight`; None of any other module."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, nn.Linear | Conv1D) and not _of_single_places(module):
        return None
    weight: Tensor = module.weight  # type: ignore[assignment]
    transposed = isinstance(module, Conv1D)
    d_out, d_in = weight.shape[1::-1] if transposed else weight.shape[:2]
    return Matrix(name, module, d_out, d_in, key, transposed, routed=routed)


def _of_single_places(module: nn.Module) -> bool:
    """Whether it is a convolution that makes of every place alone what a matrix makes of a token."""
    single = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    return single and module.padding == (0, 0)


def _expert_lists(layer: nn.Module, counts: Collection[int]) -> list[str]:
    """The lists of a module for each expert: beside them something has a row for each, which routes."""
    found = []
    for name, module in layer.named_modules():
        children = dict(module.named_children())
        for held, child in children.items():
            if isinstance(child, nn.ModuleList) and len(child) in counts:
                beside = [one for other, one in children.items() if other != held]
                rows = (len(one) for other in beside for one in other.parameters() if one.ndim == 2)
                if len(child) in rows:
                    found.append(f"{name}.{held}".removeprefix("."))
    return found


def _stacked(
    prefix: str,
    full: str,
    module: nn.Module,
    key_of: Callable[[str], str | None],
    counts: Collection[int],
    pieces: Mapping[str, Sequence[Piece]],
) -> Iterator[Matrix]:
    """The matrices of the experts in a module's own parameters, expert by expert, by the checkpoint's names for them.

    A tensor of its own is a name as it is; of a stack, the stack's with the expert's number behind it.
    """
    found: list[tuple[int, Matrix]] = []
    for kind, transposed in _stacks(module, counts).items():
        parameter: Tensor = getattr(module, kind)
        d_out, d_in = parameter.shape[:0:-1] if transposed else parameter.shape[1:]
        key = key_of(f"{full}.{kind}")
        common: dict[str, Any] = {"parameter_name": kind, "routed": True}
        for piece in () if transposed else pieces.get(f"{full}.{kind}", ()):
            where: dict[str, Any] = {"key": piece.key, "transposed": piece.transposed, "place": piece.place}
            made = Matrix("", module, piece.shape[0], piece.shape[1], joined=piece.joined, **where, **common)
            found.append((piece.joined.expert, made))
        if key is not None:
            found += [
                (place, Matrix("", module, d_out, d_in, key, transposed, place, **common))
                for place in range(len(parameter))
            ]
    for _, matrix in sorted(found, key=lambda item: item[0]):
        name = f"{prefix}.{inside_layer(str(matrix.key)).removesuffix('.weight')}"
        yield replace(matrix, name=name if matrix.place is None else f"{name}.{matrix.place}")


def _stacks(module: nn.Module, counts: Collection[int]) -> dict[str, bool]:
    """The parameters [E, ., .] of a module that hold a matrix for each expert, and whether each is [D_in, D_out].

    As transformers marks the module, or its sizes tell of a single one; else there are two, and the second takes its
    outputs' features from what the first takes its inputs' from, which tells how both lie.
    """
    own = {
        name: one.shape
        for name, one in module.named_parameters(recurse=False)
        if one.ndim == 3 and (len(one) in counts or hasattr(module, "is_transposed"))
    }
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return {}
    if hasattr(module, "is_transposed"):
        return dict.fromkeys(own, bool(module.is_transposed))
    sizes = getattr(module, "output_size", None), getattr(module, "input_size", None)
    if [tuple(shape[1:]) for shape in own.values()] == [sizes]:
        return dict.fromkeys(own, False)
    if len(own) != 2:
        return {}
    first, last = own.values()
    turned, plain = first[1] == last[2], first[2] == last[1]
    return dict.fromkeys(own, turned) if turned != plain else {}


def routers_in(layer: nn.Module, prefix: str, experts: Collection[int]) -> Iterator[str]:
    """Full names, by the layer's, of the weights that route and gate: few outputs, or one an expert beside them.

    They hold next to no weights, and all that the experts compute hangs on them. experts: how many the config speaks
    of. Where one of a router's linears has an output for each expert, its others are the router's, too.
    """
    found = {one for one in layer.modules() if isinstance(one, nn.Linear) and _gates(*one.weight.shape)}
    for module in layer.modules():
        holders = {child: count for name, child in module.named_children() if (count := _experts(name, child))}
        counts = {*holders.values(), *experts}
        for child in module.children() if holders else ():
            linears = {one for one in child.modules() if isinstance(one, nn.Linear)}
            if child not in holders and any(len(one.weight) in counts for one in linears):
                found |= linears
    yield from (f"{prefix}.{name}.weight" for name, module in layer.named_modules() if module in found)


def _gates(d_out: int, d_in: int) -> bool:
    """Whether a few numbers are all that is made of so many features."""
    return d_out == 1 or (d_out <= 8 and d_in >= 32 * d_out)


def _experts(name: str, module: nn.Module) -> int:
    """How many experts a module holds, as a list or as stacks [E, ., .], 1 by its name alone; 0 for any other."""
    if isinstance(module, nn.ModuleList):
        return len(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):  # whose weights are as many filters, and no experts
        return 0
    stacked = max((len(one) for one in module.parameters(recurse=False) if one.ndim == 3), default=0)
    return stacked or int(name == "experts")


def finite(tensor: Tensor, key: str, checkpoint: Checkpoint) -> Tensor:
    """`tensor` itself. Raises InputError naming `key` when it holds NaN or infinity."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise InputError(
                f"the tensor {key} of {checkpoint.directory} holds NaN or infinite values; fetch or train it anew."
            )
    return tensor
