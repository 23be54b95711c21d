"""One pruned decoder layer after the dense one: its masks learned, its weights reconstructed.

Both work on the pruned model's hidden states, towards the dense model's.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from trimcli.methods.blocks.learn import Counts, Learnable, Learned, learn_masks
from trimcli.methods.blocks.reconstruct import Batch, Reconstructed, reconstruct
from trimcli.methods.choice import Target
from trimcli.methods.masks import slices
from trimcli.methods.recipe import Recipe
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import DecoderLayer
from trimcli.pipeline.walk import Walk

# One batch in so many is held out, and at least the last.
HELDOUT = 8


def learn_layer(
    walk: Walk,
    dense: Walk,
    layer: DecoderLayer,
    pruned: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    targets: Mapping[str, Target],
    recipe: Recipe,
) -> tuple[dict[str, Tensor], Learned]:
    """Learn the masks of a loaded, pruned layer; by linear what they became, bool [D_out, D_in].

    walk: at this layer. dense: the dense model's, past this layer. pruned: by linear the dense weight [D_out, D_in],
    its mask and its importance.
    """
    mine = [linear for linear in layer.linears if linear.name in pruned]
    matrices = []
    for linear in mine:
        pattern = targets[linear.name].pattern
        weight, keep, importance = pruned[linear.name]
        counts: Counts = pattern[1] if pattern else "matrix" if recipe.refine_rows == "free" else "row"
        name = parameter_inside(layer, linear)
        matrices.append(Learnable(name, linear.within, weight.to(linear.parameter), keep, importance, counts))
    training, heldout = _batches(walk, dense, layer)
    title = f"layer {layer.index + 1}/{len(walk.skeleton.layers)} learn masks"
    with walk.progress.task(title, recipe.refine_steps) as advance:
        steps, lr = recipe.refine_steps, recipe.refine_lr
        learned = learn_masks(layer.module, matrices, training, heldout, steps=steps, lr=lr, advance=advance)
    return {linear.name: keep for linear, keep in zip(mine, learned.keep, strict=True)}, learned


def reconstruct_layer(
    walk: Walk, dense: Walk, layer: DecoderLayer, keep: Mapping[str, Tensor], recipe: Recipe
) -> Reconstructed:
    """Fit a loaded, pruned layer to the dense one; what is fitted are its pruned matrices, biases and norms.

    walk: at this layer. dense: the dense model's, past this layer. keep: the masks [D_out, D_in] by linear. The values
    are by parameter name inside the layer, as it holds them.
    """
    fitted: dict[str, Tensor | None] = {}
    for linear in layer.linears:
        if linear.name in keep:
            held = torch.ones_like(linear.parameter, dtype=torch.bool)
            linear.within(held).copy_(keep[linear.name])
            fitted[parameter_inside(layer, linear)] = held
    for name, parameter in layer.module.named_parameters():
        key = walk.skeleton.key_of(f"{layer.name}.{name}")
        if key is not None and parameter.ndim == 1 and parameter.is_floating_point():
            fitted[name] = None
    training, heldout = _batches(walk, dense, layer)
    title = f"layer {layer.index + 1}/{len(walk.skeleton.layers)} reconstruct"
    with walk.progress.task(title, recipe.reconstruct_steps) as advance:
        steps, lr = recipe.reconstruct_steps, recipe.reconstruct_lr
        return reconstruct(layer.module, fitted, training, heldout, steps=steps, lr=lr, advance=advance)


def parameter_inside(layer: DecoderLayer, linear: Matrix) -> str:
    """The name inside its layer of the parameter that a matrix lies in."""
    return f"{linear.name}.{linear.parameter_name}".removeprefix(f"{layer.name}.")


def _batches(walk: Walk, dense: Walk, layer: DecoderLayer) -> tuple[list[Batch], list[Batch]]:
    """The layer's batches, for training and held out."""
    batches = [
        Batch(partial(walk.stream.arguments, layer, rows), partial(dense.states, rows))
        for rows in slices(walk.nsamples, walk.batch_size)
    ]
    count = max(1, len(batches) // HELDOUT)
    return batches[:-count] or batches, batches[-count:]
