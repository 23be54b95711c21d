"""The two blocks of a decoder layer, attention and MLP, found by structure; gradients over one of them.

LLM-Barber (Su et al. 2024, section 3) looks at one block at a time. No architecture is known by name:
blocks are the modules that hold the layer's linears, told apart by the order in which a pass runs them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from trimcli.errors import OptionError

Run = Callable[[Tensor], Any]
"""Runs the decoder layer on hidden states [1, L, D] with everything else it is called with."""

# How far a block run on its own may be from what it gave inside its layer, relative to the largest value.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Call:
    """What a block was called with inside its layer, and what it returned.

    output: the block's value (the first entry where it returns a tuple), in the layer's dtype.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass(frozen=True)
class Block:
    """The attention or the MLP of one decoder layer.

    linears: its prunable linears' names, in the order they were given. paths: their names inside `module`.
    module: runs the block on its own. entry, exit: the modules inside the layer at which the block's inputs
    and its value are recorded: `module` itself, or the first and the last of a chain the layer runs itself.
    """

    linears: tuple[str, ...]
    paths: dict[str, str]
    module: nn.Module
    entry: nn.Module
    exit: nn.Module

    def capture(self, run: Run, hidden: Tensor) -> Call:
        """Run the layer on `hidden` [1, L, D] and record the block's call; no graph is built."""
        # Cloned: layers add to what a block gave, or was given, in place.
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outputs: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments.append((_mapped(args, torch.clone), _mapped(kwargs, torch.clone)))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs.append(_value(output).clone())

        with torch.no_grad(), _hooked() as handles:
            handles.append(self.entry.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(self.exit.register_forward_hook(after))
            run(hidden)
        return Call(*arguments[-1], outputs[-1])

    def call(self, call: Call) -> Tensor:
        """Run the block on its own, with its present weights, on recorded inputs; returns its value."""
        return _value(self.module(*call.args, **call.kwargs))


def find_blocks(layer: nn.Module, linears: Mapping[str, nn.Module], run: Run, probe: Tensor, name: str) -> list[Block]:
    """The attention block and the MLP block of a decoder layer, in order of execution.

    layer: the loaded decoder layer, in evaluation mode. linears: all its prunable linears, by any name. run:
    calls the layer on hidden states, without a cache of past tokens. probe: hidden states [1, L, D] to find
    out with; the layer runs on them a few times. name: the layer's, for messages.

    Raises OptionError unless the layer runs two modules with linears (or one, and a chain of its own linears
    with modules between them), one after the other, the second fed by what the first returns.
    """

    def unfit(reason: str) -> OptionError:
        return OptionError(f"--prune-barber cannot work on {name}: {reason}; prune without --prune-barber.")

    groups, owner = _groups(layer, linears)
    if len(groups) != 2:
        places = ", ".join(_short(group) for group in groups) or "none"
        raise unfit(
            f"it needs linears in two blocks, attention and MLP, and this layer has them in {len(groups)} ({places})"
        )
    order = _execution(layer, run, probe)
    blocks = []
    for group in groups:
        if any(linears[linear] in owner.children() for linear in group):
            block = _chain(owner, group, linears, order)
        else:
            block = _module_block(layer, group, linears, order)
        if block is None:
            raise unfit(f"{_short(group)} sit in no module that a pass runs once, and form no chain")
        call = block.capture(run, probe)
        with torch.no_grad():
            alone = block.call(call)
        if not _close(alone, call.output):
            raise unfit(f"run on their own, {_short(group)} do not give what they give inside the layer")
        blocks.append(block)
    blocks.sort(key=lambda block: order.index(block.entry))
    first, second = blocks
    if not _feeds(first, second, run, probe):
        pair = f"{_short(first.linears)} and {_short(second.linears)}"
        raise unfit(f"{pair} run in parallel, not one block after the other")
    return blocks


def block_gradients(
    block: Block, dense: Mapping[str, Tensor], calls: Iterable[Call], samples: int
) -> dict[str, Tensor]:
    """Mean squared gradients of a block's reconstruction loss, at the dense weights.

    dense: the dense weight of each of the block's linears, as stored, any float dtype. calls: the sparse
    block's calls, one sample each; taken one at a time, so they may be captured on the fly. samples: N, over
    which the mean is taken; where `calls` are a share of the samples, the shares' results add up to the mean.

    Returns per linear g = (1/N) * sum_j (d loss_j / d W)^2, elementwise, float32, as stored, with loss_j the
    mean square of the dense block's value minus the sparse one's, on the sparse model's input. Autograd sees
    the block alone, in float32 whatever the layer's dtype; what `dense` does not name (biases, norms) is the
    module's own. Su et al. 2024, section 3.
    """
    with torch.inference_mode(False), torch.enable_grad():
        module = block.module
        state = dict(chain(module.named_parameters(), module.named_buffers()))
        state = {path: _plain(value) for path, value in state.items()}
        weights = {}
        for name in block.linears:
            path = f"{block.paths[name]}.weight"
            weights[name] = _plain(dense[name]).to(state[path].device).requires_grad_()
            state[path] = weights[name]
        sums = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
        for call in calls:
            args, kwargs = _mapped(call.args, _plain), _mapped(call.kwargs, _plain)
            value = _value(functional_call(module, state, args, kwargs))
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


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments with every tensor changed, inside tuples, lists and dictionaries too."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        return {key: _mapped(entry, change) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(entry, change) for entry in value)
    return value


def _plain(tensor: Tensor) -> Tensor:
    """For autograd: floats in float32, no graph, no inference tensor."""
    cast = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return cast.clone() if cast.is_inference() else cast


@contextmanager
def _hooked() -> Iterator[list[RemovableHandle]]:
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


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


def _groups(layer: nn.Module, linears: Mapping[str, nn.Module]) -> tuple[list[list[str]], nn.Module]:
    """Linears by the child of their common owner that holds them, the owner's own together; and the owner."""
    owner = _holder(layer, linears.values(), lambda module: module not in linears.values()) or layer
    grouped: dict[nn.Module, list[str]] = {}
    for name, linear in linears.items():
        child = next(child for child in owner.children() if linear in set(child.modules()))
        grouped.setdefault(owner if child is linear else child, []).append(name)
    return list(grouped.values()), owner


def _execution(layer: nn.Module, run: Run, probe: Tensor) -> list[nn.Module]:
    """The layer's modules in the order in which one pass calls them, as often as it does."""
    order: list[nn.Module] = []
    with torch.no_grad(), _hooked() as handles:
        for module in layer.modules():
            handles.append(module.register_forward_pre_hook(lambda called, _args: order.append(called)))
        run(probe)
    return order


def _module_block(
    layer: nn.Module, group: Sequence[str], linears: Mapping[str, nn.Module], order: Sequence[nn.Module]
) -> Block | None:
    excluded = {layer, *linears.values()}
    # A list of experts is never called itself; the module that routes to them is.
    module = _holder(
        layer,
        [linears[name] for name in group],
        lambda module: module not in excluded and order.count(module) == 1,
    )
    return _block([module], group, linears) if module is not None else None


def _chain(
    owner: nn.Module, group: Sequence[str], linears: Mapping[str, nn.Module], order: Sequence[nn.Module]
) -> Block | None:
    """The owner's own linears with the children it calls between them, as one module.

    What the owner computes between them without a module is not in the chain: the caller compares values.
    """
    children = set(owner.children())
    called = [module for module in order if module in children]
    own = [linears[name] for name in group]
    if any(called.count(linear) != 1 for linear in own):
        return None
    places = sorted(called.index(linear) for linear in own)
    return _block(called[places[0] : places[-1] + 1], group, linears)


def _block(steps: Sequence[nn.Module], group: Sequence[str], linears: Mapping[str, nn.Module]) -> Block:
    module = steps[0] if len(steps) == 1 else nn.Sequential(*steps)
    paths = {found: path for path, found in module.named_modules()}
    return Block(
        linears=tuple(group),
        paths={name: paths[linears[name]] for name in group},
        module=module,
        entry=steps[0],
        exit=steps[-1],
    )


def _feeds(first: Block, second: Block, run: Run, probe: Tensor) -> bool:
    """Whether the second block's input changes when the first one's value does."""

    def disturb(_module: nn.Module, _args: Any, output: Any) -> Any:
        value = _value(output)
        # A ramp as large as the hidden states: neither a layer norm nor the residual stream hides it.
        ramp = torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype, device=value.device)
        changed = ramp.expand_as(value) * (1 + probe.abs().max())
        if isinstance(output, Tensor):
            return changed
        return [changed, *output[1:]] if isinstance(output, list) else (changed, *output[1:])

    quiet, again = second.capture(run, probe), second.capture(run, probe)
    with _hooked() as handles:
        handles.append(first.exit.register_forward_hook(disturb))
        disturbed = second.capture(run, probe)
    # Some kernels do not give the same bits twice; that is no answer.
    return _distance(quiet, disturbed) > 4 * _distance(quiet, again)


def _distance(one: Call, other: Call) -> float:
    pairs = zip(_tensors((one.args, one.kwargs)), _tensors((other.args, other.kwargs)), strict=True)
    return max((float((a.float() - b.float()).abs().max()) for a, b in pairs), default=0.0)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(value, note)
    return found
