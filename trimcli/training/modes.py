"""The ways to train: adapters, all kept weights, or masks that are learned and then held."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, set_seed

from trimcli.console import Progress
from trimcli.files.parts import Parts
from trimcli.methods import masks
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton
from trimcli.training.admm import STATE as SPLIT
from trimcli.training.admm import Budget, Splitting
from trimcli.training.lora import add_adapters
from trimcli.training.masked import Held, KeepOf, gather, whole
from trimcli.training.options import FinetuneOptions
from trimcli.training.record import Record
from trimcli.training.teacher import Teacher
from trimcli.training.trainer import (
    STATE,
    Announce,
    Finetuner,
    Run,
    arguments_of,
    early_stop,
    last_checkpoint,
    on_device,
    train,
    unheard,
)
from trimcli.world import is_first


@dataclass(frozen=True)
class Task:
    """What a training is of.

    skeleton: loaded whole in float32. linears: those that masks hold or ADMM prunes. samples: tokens to train on and
    held-out ones, int [n, L] each. steps: of them all, `learned` those of ADMM. folder: for checkpoints.
    """

    skeleton: Skeleton
    linears: list[Matrix]
    options: FinetuneOptions
    samples: tuple[Tensor, Tensor]
    teacher: Teacher | None
    steps: int
    learned: int
    folder: Path
    progress: Progress
    announce: Announce


@dataclass(frozen=True)
class Outcome:
    """What came of it. values: new values by parameter name, none where the weights stay. keep_of: the masks.

    adapter: a peft model to be saved, under `--merge none`.
    """

    records: list[Record]
    values: Mapping[str, Tensor]
    keep_of: KeepOf
    adapter: Any = None


def trainable(skeleton: Skeleton, options: FinetuneOptions) -> dict[str, torch.nn.Parameter]:
    """The parameters that train in all modes but lora, by name: each that one tensor of the checkpoint holds."""
    parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
    stored = {id(parameters[name]) for name in skeleton.stored_parameters().values()}
    frozen = set[int]()
    if options.freeze_embeddings:
        ends = (skeleton.model.get_input_embeddings(), skeleton.model.get_output_embeddings())
        frozen = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
    own = skeleton.model.named_parameters()
    return {
        name: one for name, one in own if id(one) in stored - frozen and (one.is_floating_point() or one.is_complex())
    }


def train_lora(task: Task, chosen: list[Matrix], keep_of: KeepOf) -> Outcome:
    """Adapters on the `chosen` linears, merged under the masks, or kept apart and plain."""
    options, held = task.options, [linear.name for linear in task.linears]
    set_seed(options.seed)
    base = str(task.skeleton.checkpoint.directory)
    with unheard():
        model = add_adapters(task.skeleton.model, chosen, held, keep_of, options, base)
    run = Run("lora", task.steps, task.folder / "train")
    record = _run(task, model, run, prepare=lambda optimizer: None)
    gather(model)
    if not record.best:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
    if options.merge == "none":
        return Outcome([record], {}, keep_of, model)
    with unheard():
        model.merge_and_unload()
    names = [f"{linear.name}.{linear.parameter_name}" for linear in chosen]
    return Outcome([record], _values(task.skeleton, names) if record.best else {}, keep_of)


def train_full(task: Task, keep_of: KeepOf) -> Outcome:
    """All weights but the held ones."""
    parameters = _unfrozen(task)
    record = _run_held(task, task.steps, keep_of)
    return Outcome([record], _values(task.skeleton, parameters) if record.best else {}, keep_of)


def train_admm(task: Task, budget: Budget) -> Outcome:
    """Masks learned by ADMM, then all weights but those that they take."""
    parameters = _unfrozen(task)
    with torch.no_grad():
        splitting = Splitting(
            task.linears, budget, steps=task.learned, interval=task.options.interval, penalty=task.options.penalty
        )
    learned = Parts(task.folder / "learned")
    if not learned.finished():
        run = Run("admm", task.learned, task.folder / "learn", keep_best=False)
        record = _run(task, task.skeleton.model, run, prepare=splitting.drive, splitting=splitting)
        with torch.no_grad():
            splitting.settle()
        found = {f"{name}.keep": masks.pack(keep.cpu()) for name, keep in splitting.keep.items()}
        values = _values(task.skeleton, parameters)
        if is_first():
            learned.directory.mkdir(parents=True, exist_ok=True)
            learned.write(0, {**values, **found}, record.document())
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    del splitting
    part, matrices = learned.read(0), {linear.name: linear for linear in task.linears}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(part.load(name))
    records = [Record(**part.facts)]

    def keep_of(name: str) -> Tensor:
        return masks.unpack(part.load(f"{name}.keep"), matrices[name].d_in)

    if task.steps > task.learned:
        records.append(_run_held(task, task.steps - task.learned, keep_of))
    best = len(records) == 1 or records[-1].best
    return Outcome(records, _values(task.skeleton, parameters) if best else _loaded(part, parameters), keep_of)


def _unfrozen(task: Task) -> dict[str, torch.nn.Parameter]:
    found = trainable(task.skeleton, task.options)
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def _loaded(part: Any, names: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: part.load(name) for name in names}


def _values(skeleton: Skeleton, names: Any) -> dict[str, Tensor]:
    """The parameters' values on the CPU, by name."""
    parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
    return {name: whole(parameters[name]) for name in names}


def _run_held(task: Task, steps: int, keep_of: KeepOf) -> Record:
    def prepare(optimizer: torch.optim.Optimizer) -> None:
        Held(task.linears, keep_of).hold(optimizer)

    record = _run(task, task.skeleton.model, Run("full", steps, task.folder / "train"), prepare=prepare)
    with torch.no_grad():
        Held(task.linears, keep_of).zero()
    return record


class _Checkpoints(TrainerCallback):
    """Leaves the state of ADMM beside Trainer's own."""

    def __init__(self, splitting: Splitting) -> None:
        self._splitting = splitting

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._splitting.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _run(
    task: Task,
    model: Any,
    run: Run,
    *,
    prepare: Callable[[torch.optim.Optimizer], None],
    splitting: Splitting | None = None,
) -> Record:
    """One run of the Trainer, gone on with where a checkpoint of it is."""
    options, device = task.options, task.skeleton.device
    model.config.use_cache = False
    callbacks: list[TrainerCallback] = [early_stop(options)] if run.keep_best else []
    callbacks += [_Checkpoints(splitting)] if splitting else []
    checkpoint = last_checkpoint(run.folder, (STATE, SPLIT) if splitting else (STATE,))
    if checkpoint and splitting:
        splitting.load(checkpoint)
    with on_device(device):
        trainer = Finetuner(
            model,
            arguments_of(options, run, device),
            task.samples,
            prepare=prepare,
            teacher=task.teacher,
            kl=options.kl,
            callbacks=callbacks,
        )
        return train(trainer, run, checkpoint, task.progress, task.announce)
