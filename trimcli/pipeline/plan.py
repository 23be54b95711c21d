"""What a prune will do, before any pass: matrices, targets, exact counts, memory, disk, forward passes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trimcli.errors import OptionError
from trimcli.files.names import kind_of
from trimcli.files.tensors import dtype_name
from trimcli.methods.choice import Target
from trimcli.methods.layers.base import Trials
from trimcli.methods.recipe import Recipe, check_patterns, expected_zeros
from trimcli.methods.stats import STATISTICS
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import LeftDense, Skeleton
from trimcli.pipeline import estimate
from trimcli.pipeline.collector import InputGroup
from trimcli.pipeline.estimate import Memory, expert_bytes, own_share, recipe_bytes, walks
from trimcli.pipeline.fit import Fit, Work, fit
from trimcli.world import ranks


@dataclass(frozen=True)
class PlannedLinear:
    """One matrix of the plan: shape (D_out, D_in), target and how many weights will go."""

    name: str
    shape: tuple[int, int]
    target: Target
    zeros: int


@dataclass(frozen=True)
class Plan:
    """What a prune will do. dense: matrices left dense. forward_passes: of the whole model.

    fit: how it keeps to memory. trial: how the trials of an allocation do, None where nothing is tried. allocation: by
    which layers will share the target, None where that is known.
    """

    model: str
    linears: tuple[PlannedLinear, ...]
    dense: Mapping[str, LeftDense]
    compute_dtype: str
    device: str
    forward_passes: float
    mask_bytes: int
    model_bytes: int | None
    fit: Fit
    trial: Fit | None = None
    allocation: str | None = None

    @property
    def fits(self) -> tuple[Fit, ...]:
        """What follows one another: of the trials, if there are any, and of the prune."""
        return (self.fit,) if self.trial is None else (self.trial, self.fit)

    @property
    def host_bytes(self) -> int:
        """Peak of the host's memory."""
        return max(one.host_bytes for one in self.fits)

    @property
    def device_bytes(self) -> int:
        """Peak of the accelerator's memory, 0 where there is none."""
        return max(one.device_bytes for one in self.fits)

    @property
    def spill(self) -> Path | None:
        """The folder that takes hidden states, `spill_bytes` of them, None where they are in memory."""
        return next((one.spill for one in self.fits if one.spill is not None), None)

    @property
    def spill_bytes(self) -> int:
        """Bytes of hidden states in files."""
        return max(one.spill_bytes for one in self.fits)

    @property
    def why(self) -> tuple[str, ...]:
        """A line for each choice that is not the usual one."""
        lines = [line for one in self.fits for line in one.why]
        if self.allocation is not None:
            lines.append(
                f"matrices are counted evenly here; --alloc {self.allocation} will share the target among them"
            )
        return tuple(dict.fromkeys(lines))

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
            "mask_bytes": self.mask_bytes,
            "model_bytes": self.model_bytes,
            "spill": None if self.spill is None else str(self.spill),
            **self.memory_document(),
        }

    def memory_document(self) -> dict[str, Any]:
        """How the prune keeps to memory, as JSON; the bytes are those of all that it does, the trials, too."""
        return {
            **self.fit.document(),
            "peak_host_bytes": self.host_bytes,
            "peak_device_bytes": self.device_bytes,
            "spill_bytes": self.spill_bytes,
            "why": list(self.why),
        }


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
    writes: int = 0,
    trials: Trials | None = None,
    allocation: str | None = None,
    batch_size: int | None = None,
    spill: Path | None = None,
    otherwise: Path | None = None,
) -> Plan:
    """The plan of a prune.

    calibrates: gathers statistics of the dense model first. writes: how many tokens at once the whole model writes
    before that. trials: of its allocation. allocation: the one that is yet to be made.
    spill: the folder for hidden states, None for memory; `otherwise`, where that has not enough. Raises OptionError,
    and ResourceError where the skeleton's limits leave no way.
    """
    shapes = {linear.name: linear.shape for linear in linears}
    check_patterns(targets, shapes)
    refuse_experts(linears, recipe.needs, recipe)
    checkpoint = skeleton.checkpoint
    why = "it was not asked for"
    dense = {name: LeftDense(one.shape, why) for name, one in skeleton.linears.items() if name not in shapes}
    known: dict[str, Any] = {"nsamples": nsamples, "seqlen": seqlen}

    def memory(batch_size: int, _: int | None) -> Memory:
        needed = estimate.pruning(skeleton, linears, recipe, calibrates=calibrates, batch_size=batch_size, **known)
        written = estimate.whole_model(skeleton, writes) if writes else needed
        return max(needed, written, key=lambda one: (one.device, one.host))

    where: dict[str, Any] = {"spill": spill, "otherwise": otherwise}
    work = Work(f"pruning {checkpoint.id}", memory, own_share(nsamples), seqlen, batch_size, **where)
    trial = fit_trials(skeleton, trials, **known, **where) if trials is not None and nsamples else None
    passes = forward_passes(recipe, len(skeleton.layers), **known)
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
        mask_bytes=sum(d_out * -(-d_in // 8) for d_out, d_in in shapes.values()),
        model_bytes=checkpoint.nbytes if saves_model and checkpoint.has_weights else None,
        fit=fit(skeleton, work),
        trial=trial,
        allocation=allocation,
    )


def fit_trials(
    skeleton: Skeleton,
    trials: Trials,
    *,
    nsamples: int,
    seqlen: int,
    spill: Path | None = None,
    otherwise: Path | None = None,
) -> Fit:
    """How the trials of an allocation keep to memory. Raises ResourceError where the limits leave no way."""

    def memory(batch_size: int, _: int | None) -> Memory:
        return estimate.trying(skeleton, trials, nsamples=nsamples, seqlen=seqlen, batch_size=batch_size)

    count = own_share(min(trials.samples, nsamples))
    words = f"trying allocations of {skeleton.checkpoint.id}"
    return fit(skeleton, Work(words, memory, count, seqlen, spill=spill, otherwise=otherwise))


def gathered_together(groups: Sequence[InputGroup], recipe: Recipe, nsamples: int) -> list[list[InputGroup]]:
    """A layer's groups as they are gathered, in one pass over the samples each: experts as many as memory is meant for.

    Inputs that are gathered anew want a single pass.
    """
    parts, taken = [[group for group in groups if not group.routed]], 0
    for group in groups:
        if not group.routed:
            continue
        needed = recipe_bytes(recipe, group.d_in, nsamples, routed=True)
        if taken and taken + needed > estimate.GATHERED and not recipe.input_recalc:
            parts.append([])
            taken = 0
        parts[-1].append(group)
        taken += needed
    return [part for part in parts if part]


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


def forward_passes(recipe: Recipe, layers: int, *, nsamples: int = 1, seqlen: int = 1) -> float:
    """Forward passes through the model that the recipe needs: two a layer when propagating, but one in the last.

    A step of learning or training counts as three of its batch.
    """
    passes = (1 if recipe.needs else 0) + 1 - 1 / layers if walks(recipe) else 0.0
    if recipe.input_recalc:
        passes += 3
    if recipe.barber:
        passes += 3 - 1 / layers if recipe.barber.needs_gradients else 1 - 1 / layers
    if recipe.needs_dense_walk:
        passes += 1 + (recipe.target == "dense") + (recipe.reconstruct == "halves")
    if recipe.blends:
        passes += 1 - 1 / layers
    if recipe.refine == "learned":
        passes += 3 * recipe.refine_steps * min(1.0, recipe.learning_samples(seqlen) / nsamples)
    if recipe.reconstructs:
        taken = recipe.reconstruct_steps * (2 if recipe.reconstruct == "halves" else 1)
        passes += 3 * taken * min(1.0, recipe.reconstruction_samples(seqlen) / nsamples)
    return passes


def _further_passes(skeleton: Skeleton, linears: Sequence[Matrix], recipe: Recipe, nsamples: int) -> float:
    """Passes through the model that experts take because not all are gathered at a time."""
    held, chosen = partial(recipe_bytes, recipe, nsamples=nsamples), {linear.name for linear in linears}
    needed = [expert_bytes(layer, chosen, held)[0] for layer in skeleton.layers]
    return sum(max(0, -(-one // estimate.GATHERED) - 1) for one in needed) / len(skeleton.layers)
