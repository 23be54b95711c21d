"""The two blocks of a decoder layer, attention and MLP, found by structure; LLM-Barber's gradients over one of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from trimcli.errors import OptionError

Run = Callable[[Tensor], Any]
"""Runs the decoder layer on hidden states [1, L, D] with everything else it is called with."""

# How far a block run on its own may be from what it gave inside its layer, relative to the largest value.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Call:
    """What a block was called with inside its layer, and its value (a tuple's first entry) in the layer's dtype."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass(frozen=True)
class Block:
    """The attention or the MLP of one decoder layer. linears: names. paths: name -> path inside `module`.

    module: runs the block on its own. entry, exit: where the layer gives its inputs and takes its value.
    """

    linears: tuple[str, ...]
    paths: dict[str, str]
    module: nn.Module
    entry: nn.Module
    exit: nn.Module

    def capture(self, run: Run, hidden: Tensor) -> Call:
        """Run the layer on `hidden` [1, L, D] and record the block's last call; no graph is built."""
        # Cloned: layers add to what a block gave, or was given, in place.
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outputs: list[Tensor] = []

        first = self.entry.register_forward_pre_hook(
            lambda _, *called: arguments.append(tree_map_only(Tensor, torch.clone, called)), with_kwargs=True
        )
        last = self.exit.register_forward_hook(lambda _, args, output: outputs.append(_value(output).clone()))
        with first, last, torch.no_grad():
            run(hidden)
        return Call(*arguments[-1], outputs[-1])

    def silenced(self) -> RemovableHandle:
        """While the handle is held, as a context, the block gives zeros inside its layer."""
        return self.exit.register_forward_hook(lambda _module, _args, output: _replaced(output, torch.zeros_like))

    def call(self, call: Call) -> Tensor:
        """The value of the block run on its own, with its present weights, on recorded inputs."""
        return _value(self.module(*call.args, **call.kwargs))


def find_blocks(
    layer: nn.Module,
    linears: Mapping[str, nn.Module],
    run: Run,
    probe: Tensor,
    name: str,
    option: str = "--prune-barber",
) -> list[Block]:
    """The attention block and the MLP block of a decoder layer, in order of execution.

    layer: loaded. linears: all its prunable ones, by any name. run: calls it without a cache of past tokens. probe:
    hidden states [1, L, D], on which it runs a few times. name, option: the layer's, and what needs blocks, for
    messages. Raises OptionError unless it runs two modules with linears (or one, and a chain of its own linears with
    modules between them), one fed by the other.
    """

    def unfit(reason: str) -> OptionError:
        return OptionError(f"{option} cannot work on {name}: {reason}; prune without {option}.")

    # By the child of the linears' common owner that holds them; under the owner those that it holds itself.
    owner = _holder(layer, linears.values(), lambda module: module not in linears.values()) or layer
    groups: dict[nn.Module, list[str]] = {}
    for linear_name, linear in linears.items():
        child = next(child for child in owner.children() if linear in set(child.modules()))
        groups.setdefault(owner if child is linear else child, []).append(linear_name)
    if len(groups) != 2:
        places = f"{len(groups)} ({', '.join(map(_short, groups.values())) or 'none'})"
        raise unfit(f"it needs linears in two blocks, attention and MLP, and this layer has them in {places}")
    order: list[nn.Module] = []  # the layer's modules in the order in which one pass calls them, as often as it does
    with torch.no_grad(), ExitStack() as hooks:
        for module in layer.modules():
            hooks.enter_context(module.register_forward_pre_hook(lambda called, _args: order.append(called)))
        run(probe)
    blocks = []
    for place, group in groups.items():
        block = _block(layer, owner if place is owner else None, {one: linears[one] for one in group}, order)
        if block is None:
            raise unfit(f"{_short(group)} sit in no module that a pass runs once, and form no chain")
        call = block.capture(run, probe)
        with torch.no_grad():
            alone = block.call(call)
        if not _close(alone, call.output):
            raise unfit(f"run on their own, {_short(group)} do not give what they give inside the layer")
        blocks.append(block)
    first, second = blocks = sorted(blocks, key=lambda block: order.index(block.entry))
    if not _feeds(first, second, run, probe):
        pair = f"{_short(first.linears)} and {_short(second.linears)}"
        raise unfit(f"{pair} run in parallel, not one block after the other")
    return blocks


def block_gradients(
    block: Block, dense: Mapping[str, Tensor], calls: Iterable[Call], samples: int
) -> dict[str, Tensor]:
    """Mean squared gradients of a block's reconstruction loss, at the dense weights (Su et al. 2024, section 3).

    dense: weight by linear, as stored, any float dtype; what it does not name (biases, norms) is the module's own.
    calls: the sparse block's, one sample each, taken one at a time. samples: N; shares of them add up to the mean.

    Returns per linear g = (1/N) * sum_j (d loss_j / d W)^2, elementwise, float32, as stored, with loss_j the mean
    square of the dense block's value minus the sparse one's, on the sparse model's input.
    """
    with torch.inference_mode(False), torch.enable_grad():
        named = chain(block.module.named_parameters(), block.module.named_buffers())
        state = {path: _plain(value) for path, value in named}
        weights = {}
        for name in block.linears:
            path = f"{block.paths[name]}.weight"
            state[path] = weights[name] = _plain(dense[name]).to(state[path].device).requires_grad_()
        sums = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
        for call in calls:
            args, kwargs = tree_map_only(Tensor, _plain, (call.args, call.kwargs))
            value = _value(functional_call(block.module, state, args, kwargs))
            loss = (value - _plain(call.output).reshape(value.shape)).square().mean()
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                # An expert that no token of this sample was sent to has no gradient.
                if gradient is not None:
                    total.addcmul_(gradient, gradient, value=1 / samples)
    return sums


def _value(output: Any) -> Tensor:
    found = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(found, Tensor):
        raise OptionError(f"--prune-barber needs blocks that return tensors, and one returned {type(found).__name__}.")
    return found


def _replaced(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a module gave, with another value."""
    changed = change(_value(output))
    return changed if isinstance(output, Tensor) else type(output)((changed, *output[1:]))


def _plain(tensor: Tensor) -> Tensor:
    """For autograd: floats in float32, no graph, no inference tensor."""
    cast = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return cast.clone() if cast.is_inference() else cast


def _close(value: Tensor, expected: Tensor) -> bool:
    if value.numel() != expected.numel():
        return False
    gap = (value.float() - expected.float().reshape(value.shape)).abs().max()
    return bool(gap <= _TOLERANCE * expected.float().abs().max())


def _short(group: Sequence[str]) -> str:
    return "+".join(name.rpartition(".")[2] for name in group)


def _holder(layer: nn.Module, wanted: Iterable[nn.Module], fits: Callable[[nn.Module], bool]) -> nn.Module | None:
    """The smallest module of `layer` that holds all `wanted` and fits."""
    inside = set(wanted)
    holders = [module for module in layer.modules() if fits(module) and inside <= set(module.modules())]
    return min(holders, key=lambda module: len(list(module.modules())), default=None)


def _block(
    layer: nn.Module, owner: nn.Module | None, linears: Mapping[str, nn.Module], order: Sequence[nn.Module]
) -> Block | None:
    """The smallest module called once that holds the linears or, where they are its `owner`'s own, a chain of these."""
    own = list(linears.values())
    if owner is None:
        # A list of experts is never called itself; the module that routes to them is.
        module = _holder(layer, own, lambda one: one not in (layer, *own) and order.count(one) == 1)
        if module is None:
            return None
        steps = [module]
    else:
        children = set(owner.children())
        called = [child for child in order if child in children]
        if any(called.count(linear) != 1 for linear in own):
            return None
        places = [called.index(linear) for linear in own]
        steps = called[min(places) : max(places) + 1]
        module = nn.Sequential(*steps) if len(steps) > 1 else steps[0]
    paths = {found: path for path, found in module.named_modules()}
    return Block(tuple(linears), {name: paths[linear] for name, linear in linears.items()}, module, steps[0], steps[-1])


def _feeds(first: Block, second: Block, run: Run, probe: Tensor) -> bool:
    """Whether the second block's input changes when the first one's value does."""

    def disturb(_module: nn.Module, _args: Any, output: Any) -> Any:
        value = _value(output)
        # A ramp as large as the hidden states: neither a layer norm nor the residual stream hides it.
        ramp = torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype, device=value.device)
        return _replaced(output, lambda _: ramp.expand_as(value) * (1 + probe.abs().max()))

    quiet, again = second.capture(run, probe), second.capture(run, probe)
    with first.exit.register_forward_hook(disturb):
        disturbed = second.capture(run, probe)
    # Some kernels do not give the same bits twice; that is no answer.
    return _distance(quiet, disturbed) > 4 * _distance(quiet, again)


def _distance(one: Call, other: Call) -> float:
    """The largest difference between any two tensors of what the calls were given."""
    pairs = zip(*(tree_leaves((call.args, call.kwargs)) for call in (one, other)), strict=True)
    gaps = (float((a.float() - b.float()).abs().max()) for a, b in pairs if isinstance(a, Tensor))
    return max(gaps, default=0.0)
