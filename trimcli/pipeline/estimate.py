"""What each stage needs of memory, estimated from shapes: the largest of what follows one another on its way."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from trimcli.methods.divergence import piece
from trimcli.methods.layers.base import Trials
from trimcli.methods.recipe import Recipe
from trimcli.methods.stats import GRAM, STATISTICS
from trimcli.model.device import held_logits
from trimcli.model.matrix import Matrix
from trimcli.model.pixels import hidden_form, picture_shape
from trimcli.model.skeleton import DecoderLayer, Skeleton
from trimcli.pipeline.reconstruct import fitted_logits
from trimcli.world import current

# What the interpreter and the libraries hold before any tensor is read; with those of an accelerator, so many times.
LIBRARIES, WITH_DEVICE = 368 << 20, 5
# Bytes a weight of a matrix that is read as it is stored or held in another dtype: itself in float32. Bytes a weight of
# the rows that are selected from at a time, and at most how many weights those are.
CONVERTED, SELECTED, TOGETHER = 4, 18, 1 << 22
# Bytes a weight of the largest matrix while an allocation tries candidates: scores, what is sorted, masks.
TRIED = 24
# Bytes a weight of a layer while its masks are rebuilt: dense weights, their float32 copies, gradients and their sums.
REBUILT = 16
# Bytes a weight of a layer while it is fitted: in float32 itself, the gradient, Adam's moments, the best so far, and in
# another dtype what the layer is called with (its masks learned: dense and masked weights, importance, score, gradient
# and its mean, masks); and what a batch's backward pass needs of its activations, by what a forward pass holds of them.
FITTED, GRAPH = 22, 3
# Copies of the logits held at a time while the last layer is fitted: both models', their logarithms, and gradients.
PREDICTED = 6
# Bytes of what is gathered at a time for a layer's experts; those beyond take another pass over the layer.
GATHERED = 8 << 30
# Linears of one layer with equal inputs are at most so many groups: of attention, its output, the MLP.
GROUPS = 3
# A layer's activations at a time, by the widest of them.
WIDEST = 4
# Bytes of a logit that is compared with another: both models' logarithms, a share and a term, in float32.
COMPARED = 16
# Bytes of a logit that is measured: itself in float32, its logarithm, and a margin for what these are made of.
MEASURED = 10

EMBEDDING, HEAD, LAYER, WHOLE = "the embedding", "the head", "a decoder layer", "the whole model"
ACTIVATIONS, LOGITS, STATES = "a batch's activations", "logits", "the hidden states"
STATISTICS_OF, MATRIX = "statistics of a layer's inputs", "the work on one matrix"
REBUILDING, FITTING = "the masks' second pass", "the fitting of a layer"
PYTHON, PICTURES = "Python and its libraries", "the pictures"

Parts = Mapping[str, int]
"""What is held at one time, in words, and its bytes."""


class Memory(NamedTuple):
    """Peak bytes of the device (0 on a CPU, where all is the host's) and of the host, besides the hidden `states`'.

    parts: what is held at the peak of where the computation is.
    """

    device: int
    host: int
    states: int
    parts: Parts


def peak_of(
    skeleton: Skeleton, stages: Iterable[Parts], states: int = 0, pictures: int = 0, brought: int = 0
) -> Memory:
    """The memory of stages that follow one another, with hidden states of so many bytes beside them.

    pictures: how many lie in the host's memory as pixels. brought: bytes that an accelerator's results take there.
    """
    largest = max(stages, key=lambda parts: sum(parts.values()))
    needed = sum(largest.values())
    beside = {PYTHON: LIBRARIES}
    if skeleton.images:
        beside[PICTURES] = pictures * math.prod(picture_shape(skeleton.config)) * 4
    if skeleton.device.type == "cpu":
        return Memory(0, sum(beside.values()) + needed, states, {**largest, **beside})
    host = sum(beside.values()) + (WITH_DEVICE - 1) * LIBRARIES + brought
    return Memory(needed, host, states, largest)


def embedding_bytes(skeleton: Skeleton) -> int:
    """Of the embedding in the compute dtype."""
    return 0 if skeleton.images else _outside_bytes(skeleton, skeleton.model.get_input_embeddings())


def head_bytes(skeleton: Skeleton) -> int:
    """Of the head in the compute dtype."""
    return _outside_bytes(skeleton, skeleton.model.get_output_embeddings())


def _outside_bytes(skeleton: Skeleton, module: nn.Module) -> int:
    """None where the weight stays in its file, whose pages the system takes back when it needs them."""
    weights = sum(parameter.numel() for parameter in module.parameters())
    return 0 if skeleton.borrows(module) else weights * skeleton.dtype.itemsize


def layer_bytes(skeleton: Skeleton) -> int:
    """Of the largest decoder layer in the compute dtype."""
    largest = max(sum(p.numel() for p in one.module.parameters()) for one in skeleton.layers)
    return int(largest) * skeleton.dtype.itemsize


def activation_bytes(skeleton: Skeleton, tokens: int) -> int:
    """What a layer holds on the way of a batch of so many tokens."""
    widest = max(max(one.shape) for one in skeleton.linears.values())
    return WIDEST * tokens * widest * skeleton.dtype.itemsize


def state_bytes(skeleton: Skeleton, tokens: int) -> int:
    """Of the hidden states of so many tokens, or places of pictures."""
    if skeleton.images:
        width = hidden_form(skeleton.model, *picture_shape(skeleton.config)[1:])[1]
    else:
        width = int(skeleton.model.get_input_embeddings().embedding_dim)
    return tokens * width * skeleton.dtype.itemsize


def own_share(nsamples: int) -> int:
    """Samples of the rank that has most of them."""
    share = current().share(nsamples, 0)
    return share.stop - share.start


def walks(recipe: Recipe) -> bool:
    """Whether choosing the masks of the first pass needs hidden states."""
    return recipe.propagate and (bool(recipe.needs) or recipe.follows_dense)


def pruning(
    skeleton: Skeleton,
    linears: Sequence[Matrix],
    recipe: Recipe,
    *,
    nsamples: int,
    seqlen: int,
    batch_size: int,
    calibrates: bool = False,
) -> Memory:
    """Of a rank that prunes. calibrates: whether statistics of the dense model are gathered first.

    The embedding; a layer with a batch's activations and the statistics it gathers; a layer with one matrix worked on;
    a layer whose masks are rebuilt.
    """
    held = partial(gathered_bytes, recipe.needs, nsamples=nsamples, wide=_wide(recipe))
    # Swaps read a Gram as it is; what inverts it, or solves with it, makes copies.
    solves = recipe.updating.changes or GRAM.name in recipe.needs
    loads = walks(recipe) or recipe.barber or calibrates
    # A loaded layer holds its weights in the compute dtype; what is not loaded is read as it is stored.
    as_is = loads and skeleton.dtype == torch.float32
    each = recipe.working + (0 if as_is else CONVERTED)
    work = [
        {STATISTICS_OF: held(one.d_in, copies=solves), MATRIX: each * one.numel + SELECTED * min(one.numel, TOGETHER)}
        for one in linears
    ]
    if not loads:
        return peak_of(skeleton, work)
    tokens = batch_size * seqlen
    chosen = {linear.name for linear in linears}
    gathered, experts = _gathered(skeleton, held), 0
    for whole, least in (expert_bytes(one, chosen, held) for one in skeleton.layers):
        experts = max(experts, whole if recipe.input_recalc else min(whole, GATHERED), least)
    inside = [*work, {ACTIVATIONS: activation_bytes(skeleton, tokens), STATISTICS_OF: gathered + experts}]
    if recipe.barber:
        inside.append({REBUILDING: REBUILT * sum(one.numel for one in skeleton.layers[0].linears)})
    if recipe.follows_dense:
        weights = max(sum(one.numel for one in layer.linears) for layer in skeleton.layers)
        learned = recipe.learning_samples(seqlen) if recipe.refine == "learned" else 0
        trained = recipe.reconstruction_samples(seqlen) if recipe.reconstructs else 0
        graph = GRAPH * activation_bytes(skeleton, min(max(learned, trained), nsamples) * seqlen)
        logits = PREDICTED * 4 * fitted_logits(skeleton.device)
        inside.append({FITTING: FITTED * weights + graph, HEAD: head_bytes(skeleton), LOGITS: logits})
    stages = [{EMBEDDING: embedding_bytes(skeleton)}, *({LAYER: layer_bytes(skeleton), **one} for one in inside)]
    streams = 1 + recipe.needs_dense_walk + (recipe.reconstruct == "halves") + recipe.blends
    count = own_share(nsamples)
    states = streams * state_bytes(skeleton, count * seqlen)
    return peak_of(skeleton, stages, states, count, _part_bytes(skeleton, recipe))


def _part_bytes(skeleton: Skeleton, recipe: Recipe) -> int:
    """Of what a finished layer leaves: masks, and about the weights as they are stored where they change."""
    weights = max(sum(one.numel for one in layer.linears) for layer in skeleton.layers)
    return weights // 8 + (weights * skeleton.dtype.itemsize if recipe.changes_weights else 0)


def walking(skeleton: Skeleton, needs: Collection[str], *, nsamples: int, seqlen: int, batch_size: int) -> Memory:
    """Of a rank whose samples walk through the model, gathering what `needs` says of the inputs."""
    gathered = _gathered(skeleton, partial(gathered_bytes, needs, nsamples=nsamples))
    activations = activation_bytes(skeleton, batch_size * seqlen)
    layer = {LAYER: layer_bytes(skeleton), ACTIVATIONS: activations, STATISTICS_OF: gathered}
    count = own_share(nsamples)
    states = state_bytes(skeleton, count * seqlen)
    return peak_of(skeleton, [{EMBEDDING: embedding_bytes(skeleton)}, layer], states, count)


def trying(skeleton: Skeleton, trials: Trials, *, nsamples: int, seqlen: int, batch_size: int) -> Memory:
    """Of a rank that tries an allocation's candidates, which walk together with the dense model.

    A layer is there twice, since its dense matrices are put back for every candidate, with a mask's bits for each.
    """
    count = own_share(min(trials.samples, nsamples))
    layer, largest = layer_bytes(skeleton), max(one.numel for one in skeleton.linears.values())
    bits = trials.together * max(sum(one.numel for one in layer.linears) for layer in skeleton.layers) // 8
    head = skeleton.model.get_output_embeddings().weight
    # Beside a sample's logits of the dense model a part of a candidate's, of which a piece is compared.
    part = min(seqlen * head.shape[0], held_logits(skeleton.device))
    logits = (seqlen * head.shape[0] + part) * skeleton.dtype.itemsize + COMPARED * min(part, piece(skeleton.device))
    activations = activation_bytes(skeleton, batch_size * seqlen)
    stages = [
        {EMBEDDING: embedding_bytes(skeleton)},
        {LAYER: 2 * layer + bits, MATRIX: TRIED * largest},
        {LAYER: 2 * layer + bits, ACTIVATIONS: activations},
        {HEAD: head_bytes(skeleton), LOGITS: logits},
    ]
    return peak_of(skeleton, stages, state_bytes(skeleton, (1 + trials.together) * count * seqlen))


def measuring(skeleton: Skeleton, *, states: int, seqlen: int, batch_size: int, logit_tokens: int) -> Memory:
    """Of a rank that measures perplexity. states: bytes of the hidden states that walk together."""
    vocabulary = skeleton.model.get_output_embeddings().weight.shape[0]
    activations = activation_bytes(skeleton, batch_size * seqlen)
    stages = [
        {EMBEDDING: embedding_bytes(skeleton)},
        {LAYER: layer_bytes(skeleton), ACTIVATIONS: activations},
        {HEAD: head_bytes(skeleton), LOGITS: MEASURED * logit_tokens * vocabulary},
    ]
    return peak_of(skeleton, stages, states)


def whole_model(skeleton: Skeleton, tokens: int) -> Memory:
    """Of what holds all of a model, with the activations of so many tokens."""
    weights = sum(parameter.numel() for parameter in skeleton.model.parameters()) * skeleton.dtype.itemsize
    return peak_of(skeleton, [{WHOLE: int(weights), ACTIVATIONS: activation_bytes(skeleton, tokens)}])


def one_matrix(skeleton: Skeleton, weight_bytes: int) -> Memory:
    """Of an allocation that looks at one matrix after another."""
    return peak_of(skeleton, [{MATRIX: weight_bytes * max(one.numel for one in skeleton.linears.values())}])


def gathered_bytes(
    needs: Collection[str], d_in: int, nsamples: int, *, wide: int = 1, routed: bool = False, copies: bool = False
) -> int:
    """Bytes of what is gathered for linears with `d_in` inputs; with the `copies` made of it while one is pruned.

    wide: 2 where it is gathered in float64.
    """
    total = 0
    for one in (STATISTICS[name] for name in needs):
        nbytes = one.routed.nbytes if routed and one.routed and one.routed.nbytes else one.nbytes
        total += nbytes(d_in, nsamples) * (1 + copies * one.copies)
    return wide * total


def expert_bytes(layer: DecoderLayer, chosen: Collection[str], held: Callable[..., int]) -> tuple[int, int]:
    """Bytes of what is gathered for a layer's experts, of each slice once: altogether, and at least at a time."""
    mine = [one for one in layer.linears if one.routed and one.name in chosen]
    slices = {_slice(one): held(one.d_in, routed=True) for one in mine}
    return sum(slices.values()), max(slices.values(), default=0)


def recipe_bytes(recipe: Recipe, d_in: int, nsamples: int, *, routed: bool = False) -> int:
    """`gathered_bytes` of what a recipe reads."""
    return gathered_bytes(recipe.needs, d_in, nsamples, wide=_wide(recipe), routed=routed)


def _wide(recipe: Recipe) -> int:
    return 2 if recipe.options_of(GRAM).gram_dtype == "float64" else 1


def _gathered(skeleton: Skeleton, held: Callable[[int], int]) -> int:
    """Bytes of what is gathered for a layer's linears that are no experts'."""
    inputs = Counter(one.d_in for one in skeleton.layers[0].linears if not one.routed)
    return sum(min(count, GROUPS) * held(d_in) for d_in, count in inputs.items())


def _slice(linear: Matrix) -> tuple[object, ...]:
    """What is the same for those of an expert's matrices that read the same: a slice of a stack, or as many inputs."""
    if linear.stacked:
        return linear.module, linear.parameter_name, linear.expert
    return linear.name.rpartition(".")[0], linear.d_in
