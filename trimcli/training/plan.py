"""What a training will do, before it does: samples, steps, tokens, memory."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from trimcli.console import size
from trimcli.errors import InputError, ResourceError
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline.estimate import LIBRARIES
from trimcli.training.options import FinetuneOptions
from trimcli.world import ranks

# Bytes a weight of a model that trains, held or not: float32 value, gradient and Adam's two moments; under ADMM of a
# matrix z and u besides, and scores; of one that has an adapter the product, masked, and what it makes of the weight.
TRAINED, SPLIT, ADAPTED = 16, 12, 10
# Bytes a trained weight in a checkpoint: its value and the moments, in float32.
SAVED = 12
# Values of a decoder layer's activations kept for the way back, by hidden states; of one's whose matrices have no
# adapters, and stay as they are; of one's that are computed anew.
KEPT, FROZEN, ANEW = 34, 20, 2
# float32 copies of logits on the way: as the model gives them, normalised, and their gradient.
COPIES = 4
# At most one part in so many samples is held out, and at most so many samples.
PART, MOST = 16, 64


@dataclass(frozen=True)
class FinetunePlan:
    """What a training will do. tokens: of all steps. trained: weights that train; held: that masks hold at zero.

    nbytes: peak memory of the compute device, estimated from shapes. learned: steps of ADMM among all.
    """

    model: str
    mode: str
    samples: int
    heldout: int
    seqlen: int
    steps: int
    learned: int
    step_samples: int
    trained: int
    held: int
    teacher: str | None
    device: str
    nbytes: int

    @property
    def tokens(self) -> int:
        """Tokens that the steps see."""
        return self.steps * self.step_samples * self.seqlen

    @property
    def epochs(self) -> float:
        """How often each sample is seen."""
        return self.steps * self.step_samples / self.samples

    @property
    def checkpoint_bytes(self) -> int:
        """Of the checkpoints that lie beside each other at most: the best, the last, and the one that replaces it."""
        saved = self.trained if self.mode == "lora" else self.trained + self.held
        return 3 * (SAVED + (SPLIT if self.mode == "admm" else 0)) * saved

    def document(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {**asdict(self), "tokens": self.tokens, "epochs": self.epochs}


def split(blocks: Tensor, source: str) -> tuple[Tensor, Tensor]:
    """The samples to train on and those held out, the last ones. Raises InputError for fewer than two."""
    if len(blocks) < 2:
        what = f"{source} holds {len(blocks)} sample, and one is to be held out beside those to train on"
        raise InputError(f"{what}; give more.")
    held = max(1, min(MOST, len(blocks) // PART))
    return blocks[:-held], blocks[-held:]


def step_count(options: FinetuneOptions, samples: int, processes: int = 1) -> int:
    """Optimizer steps, of --steps or --epochs."""
    if options.steps is not None:
        return options.steps
    each = options.batch_size * options.accumulate * processes
    return max(1, math.ceil(samples * (1.0 if options.epochs is None else options.epochs) / each))


def learned_steps(options: FinetuneOptions, steps: int) -> int:
    """How many of the steps learn the masks: all but the polish, and at least one."""
    return max(1, round(steps * (1 - options.polish))) if options.mode == "admm" else 0


def make_plan(
    skeleton: Skeleton,
    options: FinetuneOptions,
    *,
    samples: tuple[Tensor, Tensor],
    held: int,
    teacher: Skeleton | None,
    adapted: Sequence[Matrix],
) -> FinetunePlan:
    """The plan. samples: those to train on and those held out. adapted: linears that get adapters."""
    train, heldout = samples
    together = ranks()
    steps = step_count(options, len(train), together)
    if options.mode == "lora":
        trained = sum(options.rank * sum(linear.shape) for linear in adapted)
    else:
        trained = sum(parameter.numel() for parameter in skeleton.model.parameters()) - held
    size = sum(one.numel() for one in teacher.model.parameters()) * teacher.dtype.itemsize if teacher else 0
    return FinetunePlan(
        model=skeleton.checkpoint.id,
        mode=options.mode,
        samples=len(train),
        heldout=len(heldout),
        seqlen=train.shape[1],
        steps=steps,
        learned=learned_steps(options, steps),
        step_samples=options.batch_size * options.accumulate * together,
        trained=trained,
        held=held,
        teacher=teacher.checkpoint.id if teacher else None,
        device=str(skeleton.device),
        nbytes=estimate_memory(skeleton, options, adapted=adapted, seqlen=train.shape[1], teacher=size),
    )


def refuse_beyond(plan: FinetunePlan, skeleton: Skeleton, options: FinetuneOptions) -> None:
    """Raise ResourceError where the limits do not hold the training, whose batches are a part of its result."""
    cpu = skeleton.device.type == "cpu"
    flag, limit = ("--max-memory", options.limits.host) if cpu else ("--max-device-memory", options.limits.device)
    if limit is None or plan.nbytes <= limit:
        return
    ways = [f"give {flag} {math.ceil(plan.nbytes / (1 << 20))}MiB", "a smaller --batch-size with more --accumulate"]
    ways += [] if options.gradient_checkpointing else ["--gradient-checkpointing"]
    ways += [] if options.mode == "lora" else ["--mode lora"]
    what = f"training {plan.model} takes about {size(plan.nbytes)} of memory, and {flag} allows {size(limit)}"
    raise ResourceError(f"{what}; {', '.join(ways[:-1])} or {ways[-1]}.")


def estimate_memory(
    skeleton: Skeleton, options: FinetuneOptions, *, adapted: Sequence[Matrix], seqlen: int, teacher: int
) -> int:
    """Peak bytes: weights, what trains them, a pass's activations and logits, the teacher's weights (`teacher` bytes).

    adapted: the linears that get adapters.
    """
    weights = sum(parameter.numel() for parameter in skeleton.model.parameters())
    pruned = sum(one.numel for one in skeleton.linears.values())
    embedding = skeleton.model.get_input_embeddings().weight
    vocabulary, width = embedding.shape
    tokens = options.batch_size * seqlen
    layer = tokens * width * 4
    depth = len(skeleton.layers)
    state, kept = TRAINED * weights + pruned, float(KEPT)
    if options.mode == "lora":
        changed = sum(one.numel for one in adapted)
        trained = options.rank * sum(sum(linear.shape) for linear in adapted)
        state = 4 * weights + TRAINED * trained + ADAPTED * changed + pruned
        kept = FROZEN + (KEPT - FROZEN) * changed / pruned
    if options.mode == "admm":
        state += SPLIT * pruned
    activations = int(layer * (ANEW * depth + kept if options.gradient_checkpointing else kept * depth))
    logits = tokens * vocabulary * 4 * (COPIES + (2 if teacher else 0))
    return state + activations + logits + teacher + (LIBRARIES if skeleton.device.type == "cpu" else 0)
