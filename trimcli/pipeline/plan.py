"""What a prune will do, before any pass: matrices, targets, exact counts, memory, disk, forward passes."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError, OptionError
from trimcli.files.names import kind_of
from trimcli.files.tensors import dtype_name
from trimcli.memory import available_bytes
from trimcli.methods.choice import Target
from trimcli.methods.layers.base import Trials
from trimcli.methods.recipe import Recipe, check_patterns, expected_zeros
from trimcli.methods.stats import GRAM, STATISTICS
from trimcli.model.matrix import Matrix
from trimcli.model.pixels import hidden_form, picture_shape
from trimcli.model.skeleton import DecoderLayer, LeftDense, Skeleton
from trimcli.options import selected
from trimcli.pipeline.collector import InputGroup
from trimcli.pipeline.reconstruct import fitted_logits
from trimcli.pipeline.walk import batch_tokens
from trimcli.world import current, ranks

# What the interpreter and the libraries hold before any tensor is read.
LIBRARIES = 320 << 20
# Bytes a weight while a matrix is worked on: weight and scores in float32, what a selection sorts, masks.
WORKED = 24
# Bytes a weight of a layer while its masks are rebuilt: dense weights, their float32 copies, gradients and their sums.
REBUILT = 16
# Bytes a weight of a layer while it is fitted: two float32 copies, the gradient, Adam's moments, the best so far (its
# masks learned: dense and masked weights, importance, score, gradient, its mean and what moves, masks); and
# what a batch's backward pass needs of its activations, by what a forward pass holds of them.
FITTED, GRAPH = 28, 4
# Copies of the logits held at a time while the last layer is fitted: both models', their logarithms, and gradients.
PREDICTED = 6
# Bytes of what is gathered at a time for a layer's experts; those beyond take another pass over the layer.
GATHERED = 8 << 30
# Linears of one layer with equal inputs are at most so many groups: of attention, its output, the MLP.
GROUPS = 3


@dataclass(frozen=True)
class PlannedLinear:
    """One matrix of the plan: shape (D_out, D_in), target and how many weights will go."""

    name: str
    shape: tuple[int, int]
    target: Target
    zeros: int


class Memory(NamedTuple):
    """Peak bytes of the device (0 on a CPU, where all is the host's) and of the host, besides the hidden `states`'."""

    device: int
    host: int
    states: int


@dataclass(frozen=True)
class Plan:
    """What a prune will do. dense: matrices left dense. forward_passes: of the whole model.

    spill: the folder that takes hidden states, `spill_bytes` of them, None where they are in memory.
    """

    model: str
    linears: tuple[PlannedLinear, ...]
    dense: Mapping[str, LeftDense]
    compute_dtype: str
    device: str
    forward_passes: float
    host_bytes: int
    device_bytes: int
    mask_bytes: int
    model_bytes: int | None
    spill: Path | None = None
    spill_bytes: int = 0

    @property
    def weights(self) -> int:
        """Weights in the pruned matrices."""
        return sum(linear.shape[0] * linear.shape[1] for linear in self.linears)

    @property
    def zeros(self) -> int:
        """Weights that will go."""
        return sum(linear.zeros for linear in self.linears)

    def document(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {
            "model": self.model,
            "linears": [
                {
                    "name": linear.name,
                    "shape": list(linear.shape),
                    "sparsity": linear.target.sparsity,
                    "pattern": list(linear.target.pattern) if linear.target.pattern else None,
                    "zeros": linear.zeros,
                }
                for linear in self.linears
            ],
            "left_dense": {name: list(left.shape) for name, left in self.dense.items()},
            "why_dense": {name: left.why for name, left in self.dense.items()},
            "weights": self.weights,
            "zeros": self.zeros,
            "sparsity": self.zeros / self.weights,
            "compute_dtype": self.compute_dtype,
            "device": self.device,
            "forward_passes": self.forward_passes,
            "peak_host_bytes": self.host_bytes,
            "peak_device_bytes": self.device_bytes,
            "mask_bytes": self.mask_bytes,
            "model_bytes": self.model_bytes,
            "spill": None if self.spill is None else str(self.spill),
            "spill_bytes": self.spill_bytes,
        }


def chosen_linears(
    skeleton: Skeleton, only: tuple[str, ...], skip: tuple[str, ...], progress: Progress = NO_PROGRESS
) -> list[Matrix]:
    """The linears that --only and --skip leave; warns of a glob without effect. InputError, OptionError if none."""
    if not skeleton.linears:
        what = f"{skeleton.checkpoint.id} has no matrix in its layers to prune"
        raise InputError(f"{what}: neither linears nor convolutions of single places; give another model.")
    found = [linear for name, linear in skeleton.linears.items() if selected(name, only, skip)]
    some = next(iter(skeleton.linears), "none")
    if not found:
        if outside := next((name for name in skeleton.linears_outside() if selected(name, only, skip)), None):
            inside = "decoder layers, whose inputs alone text tells"
            if skeleton.images:
                inside = "blocks, which alone are pruned"
            what = f"{outside} lies outside of the {len(skeleton.layers)} {inside}"
            raise OptionError(f"{what}; --only takes linears inside of them, such as {some}.")
        left = f"of {len(skeleton.linears)} linears (such as {some}), --only {list(only)} and --skip {list(skip)}"
        raise OptionError(f"nothing matches: {left} leave none; globs are matched against full module names.")
    for flag, globs in (("--only", only), ("--skip", skip)):
        for glob in globs:
            if not any(selected(name, (glob,), ()) for name in skeleton.linears):
                progress.warn(f"{flag} {glob!r} matches none of the {len(skeleton.linears)} linears, such as {some}.")
    return found


def make_plan(
    skeleton: Skeleton,
    linears: list[Matrix],
    targets: Mapping[str, Target],
    recipe: Recipe,
    *,
    nsamples: int,
    seqlen: int,
    saves_model: bool = False,
    calibrates: bool = False,
    trials: Trials | None = None,
    spill: Path | None = None,
    otherwise: Path | None = None,
) -> Plan:
    """The plan of a prune. calibrates: gathers statistics of the dense model first. trials: of its allocation.

    spill: the folder for hidden states, None for memory; `otherwise`, where that has not enough. Raises OptionError.
    """
    shapes = {linear.name: linear.shape for linear in linears}
    check_patterns(targets, shapes)
    refuse_experts(linears, recipe.needs, recipe)
    checkpoint = skeleton.checkpoint
    why = "it was not asked for"
    dense = {name: LeftDense(one.shape, why) for name, one in skeleton.linears.items() if name not in shapes}
    known: dict[str, Any] = {"nsamples": nsamples, "seqlen": seqlen, "trials": trials}
    memory = estimate_memory(skeleton, linears, recipe, calibrates=calibrates, **known)
    room = available_bytes()
    if spill is None and not memory.device and room is not None and memory.host + memory.states > room:
        spill = otherwise
    spilled = memory.states if spill is not None else 0
    kept = memory.states - spilled
    passes = forward_passes(recipe, len(skeleton.layers), nsamples / recipe.step_samples(seqlen))
    if walks(recipe) and not recipe.input_recalc:
        passes += _further_passes(skeleton, linears, recipe, nsamples)
    if trials is not None and nsamples:
        walked = trials.candidates + -(-trials.candidates // trials.together)  # the dense model goes along
        passes += walked * min(trials.samples, nsamples) / nsamples
    return Plan(
        model=checkpoint.id,
        linears=tuple(
            PlannedLinear(name, shape, targets[name], expected_zeros(shape, targets[name], recipe))
            for name, shape in shapes.items()
        ),
        dense={**dense, **skeleton.left_dense()},
        compute_dtype=dtype_name(skeleton.dtype),
        device=str(skeleton.device),
        forward_passes=passes,
        host_bytes=memory.host + (0 if memory.device else kept),
        device_bytes=memory.device + (kept if memory.device else 0),
        mask_bytes=sum(d_out * -(-d_in // 8) for d_out, d_in in shapes.values()),
        model_bytes=checkpoint.nbytes if saves_model and checkpoint.has_weights else None,
        spill=spill if spilled else None,
        spill_bytes=spilled,
    )


def gathered_together(groups: Sequence[InputGroup], recipe: Recipe, nsamples: int) -> list[list[InputGroup]]:
    """A layer's groups as they are gathered, in one pass over the samples each: experts as many as memory is meant for.

    Inputs that are gathered anew want a single pass.
    """
    parts, taken = [[group for group in groups if not group.routed]], 0
    for group in groups:
        if not group.routed:
            continue
        needed = gathered_bytes(recipe, group.d_in, nsamples, routed=True)
        if taken and taken + needed > GATHERED and not recipe.input_recalc:
            parts.append([])
            taken = 0
        parts[-1].append(group)
        taken += needed
    return [part for part in parts if part]


def gathered_bytes(recipe: Recipe, d_in: int, nsamples: int, *, routed: bool = False, copies: bool = False) -> int:
    """Bytes of what is gathered for linears with `d_in` inputs; with the `copies` made of it while one is pruned."""
    wide, total = 2 if recipe.options_of(GRAM).gram_dtype == "float64" else 1, 0
    for one in (STATISTICS[name] for name in recipe.needs):
        nbytes = one.routed.nbytes if routed and one.routed and one.routed.nbytes else one.nbytes
        total += nbytes(d_in, nsamples) * (1 + copies * one.copies)
    return wide * total


def refuse_experts(linears: Sequence[Matrix], needs: Collection[str], recipe: Recipe | None = None) -> None:
    """Raise OptionError where experts are to be pruned in a way that is not theirs yet, or need such a statistic."""
    routed = [linear.name for linear in linears if linear.routed]
    if not routed:
        return
    wrong = [
        (needs and ranks() > 1, "a run of several processes"),
        (recipe and recipe.barber, "--prune-barber"),
        (recipe and recipe.reconstructs, f"--reconstruct {recipe and recipe.reconstruct}"),
        (recipe and recipe.refine == "learned", "--refine learned"),
        (recipe and recipe.target == "dense", "--target dense"),
        *((STATISTICS[name].routed is None, f"the statistic {name}") for name in sorted(needs)),
    ]
    if what := next((flag for given, flag in wrong if given), None):
        globs = dict.fromkeys(f"--skip '*.{kind_of(name)}'" for name in routed)
        raise OptionError(
            f"{what} does not work on experts, which only some tokens reach, such as {routed[0]}; leave it out, or "
            f"leave experts dense with {' '.join(globs)}."
        )


def walks(recipe: Recipe) -> bool:
    """Whether choosing the masks of the first pass needs hidden states."""
    return recipe.propagate and (bool(recipe.needs) or recipe.follows_dense)


def forward_passes(recipe: Recipe, layers: int, steps: float = 1.0) -> float:
    """Forward passes through the model that the recipe needs: two a layer when propagating, but one in the last.

    A step of training counts as three of its batch. steps: in which all samples are seen once.
    """
    passes = (1 if recipe.needs else 0) + 1 - 1 / layers if walks(recipe) else 0.0
    if recipe.input_recalc:
        passes += 3
    if recipe.barber:
        passes += 3 - 1 / layers if recipe.barber.needs_gradients else 1 - 1 / layers
    if recipe.needs_dense_walk:
        passes += 1 + (recipe.target == "dense") + (recipe.reconstruct == "halves")
    if recipe.follows_dense:
        taken = recipe.refine_steps if recipe.refine == "learned" else 0
        taken += recipe.reconstruct_steps * {"none": 0, "layer": 1, "halves": 2}[recipe.reconstruct]
        passes += 3 * taken / max(1.0, steps)
    return passes


def _expert_bytes(layer: DecoderLayer, chosen: Collection[str], held: Callable[..., int]) -> tuple[int, int]:
    """Bytes of what is gathered for a layer's experts, of each slice once: altogether, and at least at a time."""
    mine = [one for one in layer.linears if one.routed and one.name in chosen]
    slices = {_slice(one): held(one.d_in, routed=True) for one in mine}
    return sum(slices.values()), max(slices.values(), default=0)


def _slice(linear: Matrix) -> tuple[object, ...]:
    """What is the same for those of an expert's matrices that read the same: a slice of a stack, or as many inputs."""
    if linear.stacked:
        return linear.module, linear.parameter_name, linear.expert
    return linear.name.rpartition(".")[0], linear.d_in


def _further_passes(skeleton: Skeleton, linears: Sequence[Matrix], recipe: Recipe, nsamples: int) -> float:
    """Passes through the model that experts take because not all are gathered at a time."""
    held, chosen = partial(gathered_bytes, recipe, nsamples=nsamples), {linear.name for linear in linears}
    needed = [_expert_bytes(layer, chosen, held)[0] for layer in skeleton.layers]
    return sum(max(0, -(-one // GATHERED) - 1) for one in needed) / len(skeleton.layers)


def estimate_memory(
    skeleton: Skeleton,
    linears: list[Matrix],
    recipe: Recipe,
    *,
    nsamples: int,
    seqlen: int,
    calibrates: bool = False,
    trials: Trials | None = None,
) -> Memory:
    """Peak memory of a rank, estimated from shapes.

    The largest of what follows one another: the embedding; a layer with a batch's activations and the statistics it
    gathers; a layer with one matrix worked on; a layer whose masks are rebuilt. calibrates: whether statistics of the
    dense model are gathered first. trials: of an allocation, whose candidates walk together.
    """
    size, cpu = skeleton.dtype.itemsize, skeleton.device.type == "cpu"
    held = partial(gathered_bytes, recipe, nsamples=nsamples)
    states = 0
    needed = worked = max(held(one.d_in, copies=True) + WORKED * one.numel for one in linears)
    if walks(recipe) or recipe.barber or calibrates:
        if skeleton.images:
            width = hidden_form(skeleton.model, *picture_shape(skeleton.config)[1:])[1]
            embedded = 0
        else:
            embedding = skeleton.model.get_input_embeddings()
            width, embedded = embedding.embedding_dim, embedding.weight.numel() * size
        layer = max(sum(p.numel() for p in one.module.parameters()) for one in skeleton.layers) * size
        widest = max(max(one.shape) for one in linears)
        activations = 4 * max(seqlen, batch_tokens(skeleton.device)) * widest * size
        inputs, experts = Counter(one.d_in for one in skeleton.layers[0].linears if not one.routed), 0
        gathered = sum(min(count, GROUPS) * held(d_in) for d_in, count in inputs.items())
        chosen = {linear.name for linear in linears}
        for whole, least in (_expert_bytes(one, chosen, held) for one in skeleton.layers):
            experts = max(experts, whole if recipe.input_recalc else min(whole, GATHERED), least)
        gathered += experts
        rebuilt = REBUILT * sum(one.numel for one in skeleton.layers[0].linears) if recipe.barber else 0
        streams = 1 + recipe.needs_dense_walk + (recipe.reconstruct == "halves")
        share = current().share(nsamples, 0)  # the largest
        states = streams * (share.stop - share.start) * seqlen * width * size
        if recipe.follows_dense:
            layers = [sum(one.numel for one in layer.linears) for layer in skeleton.layers]
            rebuilt = FITTED * max(layers) + GRAPH * 4 * recipe.step_samples(seqlen) * seqlen * widest * size
            head = skeleton.model.get_output_embeddings()
            rebuilt += head.weight.numel() * size + PREDICTED * 4 * fitted_logits(skeleton.device)
        needed = max(embedded, layer + max(activations + gathered, worked, rebuilt))
        if trials is not None:  # the layer twice: its dense matrices are put back for every candidate
            tokens = (1 + trials.together) * min(trials.samples, nsamples) * seqlen
            tried = tokens * width * size
            needed = max(needed, 2 * layer + activations + tried - states)
    return Memory(0, LIBRARIES + needed, states) if cpu else Memory(needed, 4 * LIBRARIES, states)
