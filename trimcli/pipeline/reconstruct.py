"""Reconstruction of one pruned decoder layer, on the pruned model's hidden states towards the dense model's."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from trimcli.methods.blocks.reconstruct import Batch, Reconstructed, reconstruct
from trimcli.methods.masks import slices
from trimcli.methods.recipe import Recipe
from trimcli.model.skeleton import DecoderLayer
from trimcli.pipeline.walk import Walk

# One batch in so many is held out, and at least the last.
HELDOUT = 8


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
            fitted[_inside(layer, f"{linear.name}.{linear.parameter_name}")] = held
    for name, parameter in layer.module.named_parameters():
        key = walk.skeleton.key_of(f"{layer.name}.{name}")
        if key is not None and parameter.ndim == 1 and parameter.is_floating_point():
            fitted[name] = None
    batches = [
        Batch(partial(walk.stream.arguments, layer, rows), partial(dense.states, rows))
        for rows in slices(walk.nsamples, walk.batch_size)
    ]
    count = max(1, len(batches) // HELDOUT)
    training = batches[:-count] or batches
    title = f"layer {layer.index + 1}/{len(walk.skeleton.layers)} reconstruct"
    with walk.progress.task(title, recipe.reconstruct_steps) as advance:
        steps, lr = recipe.reconstruct_steps, recipe.reconstruct_lr
        return reconstruct(layer.module, fitted, training, batches[-count:], steps=steps, lr=lr, advance=advance)


def _inside(layer: DecoderLayer, name: str) -> str:
    return name.removeprefix(f"{layer.name}.")
