"""LLM-Barber's second pass over one decoder layer: attention first, then, with the attention rebuilt, the MLP."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial

from torch import Tensor, nn

from trimcli.methods.blocks.barber import rebuild
from trimcli.methods.blocks.structure import Block, Call, block_gradients, find_blocks
from trimcli.methods.recipe import Recipe
from trimcli.model.skeleton import DecoderLayer
from trimcli.pipeline.walk import Walk
from trimcli.world import current


def rebuild_layer(
    walk: Walk,
    layer: DecoderLayer,
    dense: Mapping[str, Tensor],
    sparse: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    patterns: Mapping[str, tuple[int, int] | None],
    recipe: Recipe,
    nsamples: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """New masks and weights [D_out, D_in] of a layer's pruned linears, which the loaded layer then holds.

    walk: at this layer, loaded with its sparse weights, with this rank's share of `nsamples` samples. dense: every
    linear's weight. sparse: right where it is kept. keep: the masks to rebuild. patterns: their N:M. Raises OptionError
    as `find_blocks` does.
    """
    assert recipe.barber is not None, "there is a second pass"
    linears = {linear.name: linear for linear in layer.linears}
    result: dict[str, tuple[Tensor, Tensor]] = {}
    for block in blocks_of(walk, layer):
        mine = [name for name in block.linears if name in keep]
        if not mine:
            continue
        gradients = None
        if recipe.barber.needs_gradients:
            found = _gradients(walk, layer, block, dense, nsamples)
            gradients = {name: linears[name].inside(found[name]) for name in mine}
        old = {name: keep[name].to(walk.skeleton.device) for name in mine}
        values = {name: sparse[name].to(walk.skeleton.device) for name in mine}
        rebuilt = rebuild(dense, values, old, gradients, patterns, recipe.barber, recipe.numerics)
        for name in mine:
            linears[name].weight.copy_(rebuilt.weight[name])
            result[name] = rebuilt.keep[name], rebuilt.weight[name]
    return result


def blocks_of(walk: Walk, layer: DecoderLayer, option: str = "--prune-barber") -> list[Block]:
    """The attention and the MLP of the loaded layer at which the walk is. Raises OptionError as `find_blocks` does."""
    called: set[nn.Module] = set()
    with ExitStack() as hooks:
        for linear in layer.linears:
            hooks.enter_context(linear.module.register_forward_pre_hook(lambda module, _args: called.add(module)))
        walk.call(layer, slice(0, 1))
    # What nobody asked for and nobody calls is in no block; an expert that is pruned may be idle at one sample.
    mine = [one for one in layer.linears if one.module in called or walk.wanted is None or one.name in walk.wanted]
    modules = {linear.name: linear.module for linear in mine}
    return find_blocks(layer.module, modules, partial(_run, walk, layer, 0), _states(walk, 0), layer.name, option)


def _run(walk: Walk, layer: DecoderLayer, sample: int, hidden: Tensor) -> Tensor:
    return walk.call(layer, slice(sample, sample + 1), hidden)


def _states(walk: Walk, sample: int) -> Tensor:
    return walk.states(slice(sample, sample + 1))


def _gradients(
    walk: Walk, layer: DecoderLayer, block: Block, dense: Mapping[str, Tensor], nsamples: int
) -> dict[str, Tensor]:
    stored = {
        linear.name: linear.replaced(linear.parameter, dense[linear.name])
        for linear in layer.linears
        if linear.name in block.linears
    }
    with walk.progress.task(f"gradients of {len(stored)} linears", walk.nsamples) as step:

        def calls() -> Iterator[Call]:
            for sample in range(walk.nsamples):
                yield block.capture(partial(_run, walk, layer, sample), _states(walk, sample))
                step()

        found = block_gradients(block, stored, calls(), nsamples)
    return {name: current().summed(gradient) for name, gradient in found.items()}
