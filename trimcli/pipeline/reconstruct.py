"""One pruned decoder layer after the dense one: its masks learned, its weights reconstructed.

Both work on the pruned model's hidden states, towards the dense model's; the last layer's, towards its predictions.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from trimcli.methods.blocks.learn import Counts, Learnable, Learned, learn_masks
from trimcli.methods.blocks.reconstruct import (
    Batch,
    Error,
    Reconstructed,
    mean_error,
    prediction_error,
    reconstruct,
    relative_error,
)
from trimcli.methods.blocks.structure import Block
from trimcli.methods.choice import Target
from trimcli.methods.masks import slices
from trimcli.methods.recipe import Recipe
from trimcli.methods.stats import fitting_samples
from trimcli.model.device import held_logits
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import DecoderLayer
from trimcli.pipeline.rebuild import blocks_of
from trimcli.pipeline.recorded import state_buffer
from trimcli.pipeline.walk import Walk


def fitted_logits(device: torch.device) -> int:
    """How many logits of either model are held at a time while the last layer is fitted, beside what it takes."""
    return held_logits(device) // 4 if device.type != "cpu" else held_logits(device)


class Guide:
    """The dense model's walk beside the pruned one's. walk: past the layer that is worked on.

    blocks: that layer's attention and MLP, where its halves are fitted one after the other.
    """

    def __init__(self, walk: Walk, recipe: Recipe) -> None:
        self.walk = walk
        self.blocks: list[Block] = []
        self._recipe = recipe
        self._blended = False
        self._kept: dict[str, Tensor] = {}

    def advance(self, layer: DecoderLayer, pruned: Walk | None = None) -> None:
        """Go past a loaded, dense layer. Raises OptionError where that has no halves and is to be fitted by them.

        pruned: the pruned model's walk, which is at the layer; None where nothing is left to be done with that.
        """
        if pruned is not None:
            self._blended = self._recipe.blends and not self.walk.skeleton.is_last(layer)
            given = partial(self._mixture, pruned, self._recipe.reconstruct_blend if self._blended else 0.0)
            if self._recipe.reconstruct == "halves":
                self.blocks = blocks_of(self.walk, layer, "--reconstruct halves")
                with self.blocks[1].silenced():  # what remains is the residual stream
                    self.walk.outputs(layer, given, partial(self._keep, "halfway"))
            if self._blended:
                self.walk.outputs(layer, given, partial(self._keep, "outputs"))
        self.walk.advance(layer)

    def _mixture(self, pruned: Walk, blend: float, rows: slice) -> Tensor:
        # Never the states themselves: a layer that adds to what it is given would change the dense model's.
        return self.walk.states(rows).lerp(pruned.states(rows), blend)

    def _keep(self, what: str, rows: slice, states: Tensor) -> None:
        if what not in self._kept:
            self._kept[what], _ = state_buffer(self.walk.skeleton, states, self.walk.nsamples)
        self._kept[what][rows] = states.to(self._kept[what].device)

    def _read(self, what: str, rows: slice) -> Tensor:
        return self._kept[what][rows].to(self.walk.skeleton.device)

    def dense(self, rows: slice) -> Tensor:
        """What the dense layer gives for the dense model's samples `rows`, [b, L, H]."""
        return self.walk.states(rows)

    def target(self, rows: slice) -> Tensor:
        """What the dense layer gives for what --reconstruct-blend says of samples `rows`, [b, L, H]."""
        return self._read("outputs", rows) if self._blended else self.dense(rows)

    def halfway(self, rows: slice) -> Tensor:
        """What the dense layer then hands from its attention to its MLP, [b, L, H]."""
        return self._read("halfway", rows)


def learn_layer(
    walk: Walk,
    guide: Guide,
    layer: DecoderLayer,
    pruned: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    targets: Mapping[str, Target],
    recipe: Recipe,
) -> tuple[dict[str, Tensor], Learned]:
    """Learn the masks of a loaded, pruned layer; by linear what they became, bool [D_out, D_in].

    walk: at this layer. guide: past it. pruned: by linear the dense weight [D_out, D_in],
    its mask and its importance.
    """
    mine = [linear for linear in layer.linears if linear.name in pruned]
    matrices = []
    for linear in mine:
        pattern = targets[linear.name].pattern
        weight, keep, importance = pruned[linear.name]
        counts: Counts = pattern[1] if pattern else "matrix" if recipe.refine_rows == "free" else "row"
        name = parameter_inside(layer, linear)
        matrices.append(Learnable(name, linear.inside, weight.to(linear.parameter), keep, importance, counts))
    title = f"{walk.skeleton.place(layer)} learn masks"
    with _measured(walk, layer) as error, walk.progress.task(title, recipe.refine_steps) as advance:
        size = recipe.learning_samples(walk.seqlen)
        training, heldout = _batches(walk, layer, size, guide.dense, error)
        steps, lr = recipe.refine_steps, recipe.refine_lr
        learned = learn_masks(layer.module, matrices, training, heldout, steps=steps, lr=lr, advance=advance)
    return {linear.name: keep for linear, keep in zip(mine, learned.keep, strict=True)}, learned


def reconstruct_layer(
    walk: Walk, guide: Guide, layer: DecoderLayer, keep: Mapping[str, Tensor], recipe: Recipe
) -> Reconstructed:
    """Fit a loaded, pruned layer to the dense one; what is fitted are its pruned matrices, biases and norms.

    walk: at this layer. guide: past it. keep: the masks [D_out, D_in] by linear. The values are by parameter name
    inside the layer, as it holds them; the errors are the layer's.
    """
    masked: dict[str, Tensor] = {}
    for linear in layer.linears:
        if linear.name in keep:
            held = torch.ones_like(linear.parameter, dtype=torch.bool)
            linear.inside(held).copy_(keep[linear.name])
            masked[parameter_inside(layer, linear)] = held
    vectors = [
        name
        for name, parameter in layer.module.named_parameters()
        if walk.skeleton.key_of(f"{layer.name}.{name}") is not None
        and parameter.ndim == 1
        and parameter.is_floating_point()
    ]
    size = recipe.reconstruction_samples(walk.seqlen)

    def fit(title: str, target: Callable[[slice], Tensor], among: Collection[str], error: Error) -> Reconstructed:
        fitted = {name: held for name, held in masked.items() if name in among} | dict.fromkeys(vectors)
        training, heldout = _batches(walk, layer, size, target, error)
        if not fitted:  # half a layer of which nothing is pruned, in a model without biases and norms that learn
            there = mean_error(layer.module, {}, heldout)
            return Reconstructed({}, there, there)
        steps, lr = recipe.reconstruct_steps, recipe.reconstruct_lr
        with walk.progress.task(f"{walk.skeleton.place(layer)} reconstruct{title}", steps) as advance:
            return reconstruct(layer.module, fitted, training, heldout, steps=steps, lr=lr, advance=advance)

    with _measured(walk, layer) as error:
        if recipe.reconstruct == "layer":
            return fit("", guide.target, masked, error)
        start = {name: layer.module.get_parameter(name).detach().float() for name in [*masked, *vectors]}
        before = mean_error(layer.module, {}, _batches(walk, layer, size, guide.target, error)[1])
        attention, mlp = (
            [parameter_inside(layer, linear) for linear in layer.linears if linear.name in block.linears]
            for block in guide.blocks
        )
        with guide.blocks[1].silenced():
            first = fit(" attention", guide.halfway, attention, relative_error)
        for name, value in first.values.items():
            layer.module.get_parameter(name).data.copy_(value)
        second = fit(" MLP", guide.target, mlp, error)
    if second.after >= before:  # a better attention may still mislead the MLP
        return Reconstructed(start, before, before)
    return Reconstructed({**start, **first.values, **second.values}, before, second.after)


@contextmanager
def _measured(walk: Walk, layer: DecoderLayer) -> Iterator[Error]:
    """How far a layer's hidden states are from the dense one's; the last one's count by what the model predicts."""
    if not walk.skeleton.is_last(layer):
        yield relative_error
        return
    vocabulary = walk.skeleton.model.get_output_embeddings().weight.shape[0]
    tokens = max(1, fitted_logits(walk.skeleton.device) // vocabulary)
    with walk.stream.predictions() as logits:
        yield (relative_error if logits is None else prediction_error(logits, tokens))


def parameter_inside(layer: DecoderLayer, linear: Matrix) -> str:
    """The name inside its layer of the parameter that a matrix lies in."""
    return f"{linear.name}.{linear.parameter_name}".removeprefix(f"{layer.name}.")


def _batches(
    walk: Walk, layer: DecoderLayer, size: int, target: Callable[[slice], Tensor], error: Error
) -> tuple[list[Batch], list[Batch]]:
    """The layer's batches of `size` samples, a step each, for training and held out; a lone sample is both."""
    rest = fitting_samples(walk.nsamples)
    held = walk.nsamples - rest or 1
    size = min(size, walk.nsamples)

    def parted(size: int) -> tuple[list[slice], list[slice]]:
        first = walk.nsamples - held
        later = [slice(first + rows.start, first + rows.stop) for rows in slices(held, size)]
        return list(slices(rest, size)), later

    parts = parted(size)
    if not walk.stream.takes({rows.stop - rows.start for part in parts for rows in part}):
        parts = parted(1)

    def batch(rows: slice) -> Batch:
        return Batch(partial(walk.stream.arguments, layer, rows), partial(target, rows), error)

    return [batch(rows) for rows in parts[0]], [batch(rows) for rows in parts[1]]
