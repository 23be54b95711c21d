"""One pruned decoder layer after the dense one: its masks learned, its weights reconstructed.

Both work on the pruned model's hidden states, towards the dense model's; the last layer's, towards its predictions.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from trimcli.files.spilled import Spilled
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
from trimcli.pipeline.walk import Walk


def fitted_logits(device: torch.device) -> int:
    """How many logits of either model are held at a time while the last layer is fitted, beside what it takes."""
    return held_logits(device) // 4 if device.type != "cpu" else held_logits(device)


class Guide:
    """The dense model's walk beside the pruned one's. walk: past the layer that is worked on.

    blocks: that layer's attention and MLP, and between: the hidden states [N, L, H] between them, by rows of samples;
    where `halves` asks for them.
    """

    def __init__(self, walk: Walk, *, halves: bool) -> None:
        self.walk = walk
        self._halves = halves
        self.blocks: list[Block] = []
        self.between: Tensor | None = None

    def advance(self, layer: DecoderLayer, *, finished: bool) -> None:
        """Go past a loaded, dense layer. finished: whether nothing is left to be done with it. OptionError."""
        if self._halves and not finished:
            self.blocks = blocks_of(self.walk, layer, "--reconstruct halves")
            with self.blocks[1].silenced():  # what remains is the residual stream
                self._keep_between(layer)
        self.walk.advance(layer)

    def _keep_between(self, layer: DecoderLayer) -> None:
        for sample in range(self.walk.nsamples):
            rows = slice(sample, sample + 1)
            states = self.walk.states(rows)
            if self.between is None:
                shape, spill = (self.walk.nsamples, *states.shape[1:]), self.walk.skeleton.spill
                self.between = (
                    Spilled(spill, shape, states.dtype).tensor if spill else states.new_empty(shape, device="cpu")
                )
            self.between[rows] = self.walk.call(layer, rows).cpu()

    def target(self, rows: slice) -> Tensor:
        """What the dense layer gives for samples `rows`, [b, L, H]."""
        return self.walk.states(rows)

    def halfway(self, rows: slice) -> Tensor:
        """What the dense layer hands from its attention to its MLP, [b, L, H]."""
        assert self.between is not None, "advance has been past a layer"
        return self.between[rows].to(self.walk.skeleton.device)


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
    title = f"layer {layer.index + 1}/{len(walk.skeleton.layers)} learn masks"
    with _measured(walk, layer) as error, walk.progress.task(title, recipe.refine_steps) as advance:
        training, heldout = _batches(walk, layer, recipe, guide.target, error)
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
    number = f"layer {layer.index + 1}/{len(walk.skeleton.layers)}"

    def fit(title: str, target: Callable[[slice], Tensor], among: Collection[str], error: Error) -> Reconstructed:
        fitted = {name: held for name, held in masked.items() if name in among} | dict.fromkeys(vectors)
        training, heldout = _batches(walk, layer, recipe, target, error)
        with walk.progress.task(f"{number} reconstruct{title}", recipe.reconstruct_steps) as advance:
            steps, lr = recipe.reconstruct_steps, recipe.reconstruct_lr
            return reconstruct(layer.module, fitted, training, heldout, steps=steps, lr=lr, advance=advance)

    with _measured(walk, layer) as error:
        if recipe.reconstruct == "layer":
            return fit("", guide.target, masked, error)
        start = {name: layer.module.get_parameter(name).detach().float() for name in [*masked, *vectors]}
        before = mean_error(layer.module, {}, _batches(walk, layer, recipe, guide.target, error)[1])
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
    if layer.index + 1 < len(walk.skeleton.layers):
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
    walk: Walk, layer: DecoderLayer, recipe: Recipe, target: Callable[[slice], Tensor], error: Error
) -> tuple[list[Batch], list[Batch]]:
    """The layer's batches, a step each, for training and held out; a lone sample is both."""
    rest = fitting_samples(walk.nsamples)
    held = walk.nsamples - rest or 1
    size = min(recipe.step_samples(walk.seqlen), walk.nsamples)

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
