"""One training run of transformers' Trainer: what it is given, what it reports, and how it is taken up again."""

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from trimcli.console import Advance, Progress, quiet_libraries
from trimcli.errors import TrimError
from trimcli.training.options import FinetuneOptions
from trimcli.training.record import Record, curves
from trimcli.training.teacher import Teacher

Announce = Callable[[str], None]
STATE, WEIGHTS = "trainer_state.json", "model.safetensors"
# So many values of the training's own loss are noted.
POINTS = 200
LOOKS = 10


class Blocks(Dataset[dict[str, Tensor]]):
    """Blocks of tokens, int [n, L], as the model takes them: what is to be predicted are the tokens themselves."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.tokens[index].long()
        return {"input_ids": row, "labels": row}


@dataclass(frozen=True)
class Run:
    """One run. phase: its name. steps: of the optimizer. folder: for checkpoints. keep_best: and stop early."""

    phase: str
    steps: int
    folder: Path
    keep_best: bool = True


class Watcher(TrainerCallback):
    """Moves a bar, and has the last step looked at and saved as well."""

    def __init__(self, advance: Advance, announce: Announce) -> None:
        self._advance, self._announce = advance, announce

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A run that goes on begins where it was."""
        self._advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step."""
        self._advance()
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Say how it goes."""
        if state.global_step:
            loss = curves(state.log_history, "loss")
            mean = f"loss {loss[-1][1]:.4f}, " if loss else ""
            found = f"{mean}held out {metrics['eval_loss']:.4f}"
            self._announce(f"step {state.global_step} of {state.max_steps}: {found}")


class Ready(TrainerCallback):
    """Calls back when all is made that a run needs: by then a model is in shards where it is to be."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first step, and before the first look at held-out samples."""
        self._then()


class Finetuner(Trainer):
    """transformers' Trainer with a teacher, and with hooks on the optimizer that it makes.

    Losses are means over the tokens of a pass, and the passes of a step count alike. prepare(optimizer): called before
    the first step, when the model holds the parameters that the optimizer steps on. Checkpoints hold what is trained,
    by its name in the model, or a peft model's adapter.
    """

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        samples: tuple[Tensor, Tensor],
        *,
        prepare: Callable[[torch.optim.Optimizer], None],
        teacher: Teacher | None = None,
        kl: float = 1.0,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        train, heldout = map(Blocks, samples)
        super().__init__(model, arguments, train_dataset=train, eval_dataset=heldout, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False
        self.samples = samples
        self._teacher, self._kl = teacher, kl
        self.add_callback(Ready(lambda: prepare(self._plain_optimizer())))

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, which accelerate wraps."""
        found: Any = self.optimizer
        return getattr(found, "optimizer", found)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Next-token loss, and while training the divergence from the teacher."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if self._teacher is not None and model.training:
            loss = loss + self._kl * self._teacher.divergence(outputs.logits, inputs["input_ids"])
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The folder is there when Trainer looks whether the best step's is, which shards are written into later."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What `save_pretrained` writes has other names for some models, which loading does not translate back."""
        from peft import PeftModel

        if isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.model
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        found = model.state_dict() if state_dict is None else state_dict
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items() if name in trained}
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def arguments_of(options: FinetuneOptions, run: Run, device: torch.device) -> TrainingArguments:
    """Trainer's arguments for a run. Autocast is bfloat16 where the options or a device that computes it say so."""
    every = min(options.every or max(1, run.steps // LOOKS), run.steps)
    half = autocast_dtype(options, device)
    # Weights come to their projection at the end of ADMM, which a rate that has come down would not let them.
    schedule = options.schedule if run.keep_best else "constant"
    best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    found = TrainingArguments(
        output_dir=str(run.folder),
        max_steps=run.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.rate,
        lr_scheduler_type="constant_with_warmup" if schedule == "constant" else schedule,
        warmup_steps=round(options.warmup * run.steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        optim="adamw_torch",
        seed=options.seed,
        bf16=half == torch.bfloat16,
        fp16=half == torch.float16,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        logging_steps=max(1, run.steps // POINTS),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        prediction_loss_only=True,
        remove_unused_columns=False,
        restore_callback_states_from_checkpoint=True,
        disable_tqdm=True,
        report_to="none",
        **(best if run.keep_best else {}),
    )
    if found.parallel_mode.value == "not_distributed":  # Trainer would split batches over all devices that it sees
        found._n_gpu = min(found.n_gpu, 1)
    return found


def autocast_dtype(options: FinetuneOptions, device: torch.device) -> torch.dtype:
    """What products are computed in; weights, gradients and moments are float32 in any case."""
    if options.dtype != "auto":
        found: torch.dtype = getattr(torch, options.dtype)
        return found
    fits = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fits else torch.float32


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Nothing but errors is heard of transformers, accelerate and peft."""
    with warnings.catch_warnings(), quiet_libraries():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Trainer, which takes the first device that there is, takes this one."""
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if device.type == "cuda" and device.index:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    try:
        with unheard():
            yield
    finally:
        if before is None:
            os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before


def last_checkpoint(folder: Path, needed: tuple[str, ...] = (STATE,)) -> Path | None:
    """The last whole checkpoint in a run's folder, None where there is none; others are removed.

    needed: what is in a whole one.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if all((path / name).is_file() for name in needed)]
    for path in set(found) - set(whole):
        shutil.rmtree(path, ignore_errors=True)
    return whole[-1] if whole else None


def train(trainer: Finetuner, run: Run, checkpoint: Path | None, progress: Progress, announce: Announce) -> Record:
    """Train from the beginning or from a checkpoint; the model then has the best weights, or the last ones.

    Raises TrimError where the loss is not finite.
    """
    # Not before: a model that is sharded is so together with its optimizer. A run that goes on has had its first look.
    trainer.args.eval_on_start = checkpoint is None
    with progress.task(f"training ({run.phase})", run.steps) as advance:
        trainer.add_callback(Watcher(advance, announce))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state, arguments = trainer.state, trainer.args
    width = trainer.samples[0].shape[1]
    loss, heldout = curves(state.log_history, "loss"), curves(state.log_history, "eval_loss")
    if not all(value == value and abs(value) != float("inf") for _, value in [*loss, *heldout]):
        raise TrimError(f"the loss is not finite from step {loss[-1][0]} on; give a smaller --lr, or --dtype float32.")
    best, before = state.global_step, heldout[0][1]
    if run.keep_best:
        better = state.best_metric is not None and state.best_metric < before
        best = int(state.best_global_step or 0) if better else 0
    each = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    tokens = state.global_step * each * width
    stopped = state.global_step < run.steps
    return Record(run.phase, state.global_step, tokens, loss, heldout, best, stopped)


def early_stop(options: FinetuneOptions) -> TrainerCallback:
    """Ends a run whose held-out loss has long not come down."""
    return EarlyStoppingCallback(options.patience)
