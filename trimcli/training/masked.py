"""Parameters of a loaded model under masks: their gradients before an optimizer's step, their values after it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trimcli.errors import MismatchError
from trimcli.files.held import Masks
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton

KeepOf = Callable[[str], Tensor]


class Held:
    """Which weights of which parameters are held at zero.

    linears: matrices of a loaded model. keep_of(name): bool [D_out, D_in]. Per parameter a bool tensor of its own shape
    and on its device is kept, True where a weight is to stay zero: a byte a weight.
    """

    def __init__(self, linears: Iterable[Matrix], keep_of: KeepOf) -> None:
        gone: dict[nn.Parameter, Tensor] = {}
        for linear in linears:
            parameter = getattr(linear.module, linear.parameter_name)
            mine = gone.setdefault(parameter, torch.zeros(parameter.shape, dtype=torch.bool))
            linear.inside(mine).copy_(~keep_of(linear.name))
        self._gone = {parameter: _beside(parameter, mine) for parameter, mine in gone.items()}

    def __iter__(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return iter(self._gone.items())

    def zero(self, *_: Any) -> None:
        """Set the held weights to zero."""
        for parameter, gone in self:
            parameter.data.masked_fill_(gone, 0)

    def zero_gradients(self, *_: Any) -> None:
        """Set the held weights' gradients to zero."""
        for parameter, gone in self:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0)

    def hold(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on no step has a gradient for a held weight, and none is other than zero after it.

        Gradients are masked before they are accumulated, so that the norm that they are clipped by does not see what
        is held, and before the step, where sharded parameters have theirs from.
        """
        for parameter, gone in self:
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, gone=gone: gradient.masked_fill(gone, 0))
        optimizer.register_step_pre_hook(self.zero_gradients)
        optimizer.register_step_post_hook(self.zero)


def _beside(parameter: Tensor, mask: Tensor) -> Tensor:
    """A whole mask on the parameter's device, and in shards where the parameter is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(mask.to(parameter.device), parameter.device_mesh, parameter.placements)
    return mask.to(parameter.device)


def whole(parameter: Tensor) -> Tensor:
    """A parameter's values on the CPU, gathered where it is sharded: then every process has to ask."""
    values = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return values.detach().cpu()


def gather(model: nn.Module) -> None:
    """Put a model's sharded parameters whole on the CPU, if it has any: then every process has to ask."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                module._parameters[name] = nn.Parameter(whole(parameter), requires_grad=False)


def check_held(skeleton: Skeleton, masks: Masks) -> None:
    """Raise MismatchError unless the model has the masks' matrices, with zeros wherever they take weights."""
    matrices, model = skeleton.matrices(masks.names), skeleton.checkpoint.id
    for name in masks.names:
        linear = matrices.get(name)
        if linear is None or linear.key is None or linear.shape != masks.shape(name):
            what = f"{masks.path} has a mask of shape {list(masks.shape(name))} for {name}, which {model} does not have"
            raise MismatchError(f"{what}; give its own masks.")
        alive = int(((linear.read(skeleton.checkpoint) != 0) & ~masks.keep(name)).count_nonzero())
        if alive:
            what = f"{alive:,} weights of {name} in {model} are not zero where the masks {masks.path} take them"
            raise MismatchError(f"{what}; give the pruned model, which apply-masks writes, or its own masks.")
