"""The finetune stage: a pruned model trained under its masks, or masks learned, to a pruned model directory."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import Tensor

from trimcli.commands.trained import Trained
from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError, OptionError
from trimcli.files.documents import read_mark
from trimcli.files.held import DirectoryMasks, Masks
from trimcli.files.manifest import ModelFingerprint, check_masks
from trimcli.files.masks import MaskFile
from trimcli.files.names import kind_of
from trimcli.files.outputs import check_outputs, check_space, inputs_of
from trimcli.files.tensors import tensor_digest
from trimcli.memory import PeakMemory
from trimcli.model.skeleton import Skeleton, open_model
from trimcli.pipeline.walk import default_seqlen, max_positions
from trimcli.text.blocks import training_blocks
from trimcli.text.tokens import load_tokenizer, read_tokens
from trimcli.training import modes
from trimcli.training.budget import goal_of
from trimcli.training.lora import adapted
from trimcli.training.masked import check_held
from trimcli.training.options import FinetuneOptions
from trimcli.training.plan import FinetunePlan, make_plan, refuse_beyond, split
from trimcli.training.record import Record
from trimcli.training.teacher import Teacher, at_hand, check_vocabulary
from trimcli.training.trainer import autocast_dtype
from trimcli.training.work import Work
from trimcli.world import ranks

Announce = Callable[[FinetunePlan], None]
Note = Callable[[str], None]
HOW_IT_RAN = {"resume", "device", "format", "trust_remote_code", "gradient_checkpointing"}


@dataclass(frozen=True)
class FinetuneSummary:
    """What finetune did. before, after: held-out next-token loss in nats. best: the step that stands.

    zeros, sparsity: of the directory as written, None for an adapter.
    """

    output: str
    mode: str
    steps: int
    tokens: int
    before: float
    after: float
    best: int
    stopped_early: bool
    teacher: str | None
    linears: int
    zeros: int | None
    sparsity: float | None
    nbytes: int
    remarks: tuple[str, ...]
    records: tuple[dict[str, Any], ...]
    seconds: float
    peak_memory: dict[str, int]
    planned: dict[str, Any]


def finetune(
    model: str,
    output: Path,
    options: FinetuneOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
    announce: Announce = lambda plan: None,
    note: Note = lambda line: None,
) -> FinetuneSummary:
    """Train `model`, a pruned directory (or any under `--mode admm`), so that every zero stays, and write the result.

    announce: is given the plan. note: is given lines on the way. Raises TrimError.
    """
    options = options or FinetuneOptions()
    options.check()
    check_outputs(inputs_of(options, model), directories=[output], force=force)
    started = time.monotonic()
    with PeakMemory() as memory:
        session = _Session(model, options, progress, note)
        announce(session.plan)
        check_space({output: session.skeleton.checkpoint.nbytes + session.plan.checkpoint_bytes})
        with Work(output, session.key(), resume=options.resume, force=force) as work:
            outcome, records = session.train(work.folder)
            written = session.write(output, outcome, force=force)
    found = written["linears"].values() if "linears" in written else ()
    last = records[-1]
    return FinetuneSummary(
        output=str(output),
        mode=options.mode,
        steps=sum(record.steps for record in records),
        tokens=sum(record.tokens for record in records),
        before=records[0].before,
        after=last.after,
        best=last.best,
        stopped_early=last.stopped_early,
        teacher=session.plan.teacher,
        linears=len(session.linears),
        zeros=sum(entry["zeros"] for entry in found) if found else None,
        sparsity=written.get("sparsity"),
        nbytes=sum(path.stat().st_size for path in output.glob("*.safetensors")) if output.is_dir() else 0,
        remarks=tuple(session.remarks),
        records=tuple(record.document() for record in records),
        seconds=time.monotonic() - started,
        peak_memory=memory.document(),
        planned=session.plan.document(),
    )


def _check_shards(options: FinetuneOptions) -> None:
    if options.mode == "admm":
        raise OptionError("--mode admm does not go with FSDP, where no process holds whole matrices; run it without.")
    if os.environ.get("FSDP_VERSION", "1") != "2":
        what = "FSDP 1 makes one flat parameter of a layer's, which no mask fits"
        raise OptionError(f"{what}; give accelerate launch --fsdp_version 2.")


class _Session:
    """One training: the model and its masks, the samples, the teacher, the plan."""

    def __init__(self, model: str, options: FinetuneOptions, progress: Progress, note: Note) -> None:
        self.options, self.progress, self.note = options, progress, note
        self.remarks: list[str] = []
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            _check_shards(options)
        # Where several processes train together, Trainer moves the model to the device of each.
        device = options.device if ranks() == 1 else "cpu"
        self.skeleton = open_model(model, replace(options, dtype="float32", device=device))
        self.mark = read_mark(self.skeleton.checkpoint.directory)
        self.masks = self._masks()
        # What says which dense model it came from: the directory, or masks for one that another tool saved.
        self.origin = self.mark or (self.masks.manifest if self.masks else {})
        matrices = self.skeleton.matrices(self.masks.names if self.masks else ())
        alone = {name: linear for name, linear in self.skeleton.linears.items() if not linear.stacked}
        names = self.masks.names if self.masks else list(alone)
        if joined := [name for name in names if matrices[name].stacked]:
            what = f"{joined[0]} in {model} is pruned, and experts that share one parameter cannot be trained yet"
            raise InputError(f"{what}; give a model that was pruned with --skip '*.{kind_of(joined[0])}'.")
        outside = next((name for name in names if name in self.skeleton.outside), None)
        if outside is not None and options.mode == "admm":
            what = (
                f"{outside} lies outside of the decoder layers, and --mode admm chooses masks anew inside of them alone"
            )
            raise OptionError(f"{what}; take --mode lora or --mode full, which hold the masks that are there.")
        self.linears = [matrices[name] for name in names]
        self.goal = goal_of(options, self.skeleton, self.linears, self.masks) if options.mode == "admm" else None
        self.chosen = adapted(alone, options.targets) if options.mode == "lora" else []
        self.samples = split(self._blocks(), str(options.tokens or options.dataset))
        self.teacher = self._teacher()
        self.plan = make_plan(
            self.skeleton, options, samples=self.samples, held=self._held(), teacher=self.teacher, adapted=self.chosen
        )
        refuse_beyond(self.plan, self.skeleton, options)

    def _masks(self) -> Masks | None:
        """The masks to be held, from a file or from the directory; None where ADMM finds them from a dense model."""
        options, checkpoint = self.options, self.skeleton.checkpoint
        found: Masks
        if options.masks is not None:
            found = MaskFile.open(options.masks)
            said = self.mark.get("model")
            other = (self.mark.get("options") or {}).get("other_weights") or found.manifest.get("changes_weights")
            if said and not other:
                check_masks(found.manifest, ModelFingerprint(**said), options.masks)
        elif options.mode == "admm" and not self.mark:
            return None
        else:
            found = DirectoryMasks(checkpoint)
        check_held(self.skeleton, found)
        if not found.names:
            raise InputError(f"{found.path} has no mask of any matrix; give a pruned directory.")
        return found

    def _held(self) -> int:
        if self.masks is None or self.options.mode == "admm":
            return 0
        return sum(self.masks.entry(name)["zeros"] for name in self.masks.names)

    def _blocks(self) -> Tensor:
        """int32 [n, seqlen]. Raises OptionError for more tokens than the model has positions."""
        options, skeleton = self.options, self.skeleton
        positions = max_positions(skeleton.config)
        if options.tokens is not None:
            rows = skeleton.model.get_input_embeddings().weight.shape[0]
            blocks = read_tokens(options.tokens, rows)[: options.nsamples]
        else:
            seqlen = options.seqlen or default_seqlen(skeleton.config)
            if positions is not None and seqlen > positions:
                known = f"the {positions} positions of {skeleton.checkpoint.id}"
                raise OptionError(f"--seqlen {seqlen} is beyond {known}; give less.")
            blocks = training_blocks(
                options.dataset,
                load_tokenizer(skeleton.checkpoint.directory, trust_remote_code=options.trust_remote_code),
                nsamples=options.nsamples,
                seqlen=seqlen,
                seed=options.seed,
                bos=options.bos,
                chat=options.chat,
            )
        if positions is not None and blocks.shape[1] > positions:
            held = f"{options.tokens} holds samples of {blocks.shape[1]} tokens, beyond the {positions} positions of"
            raise OptionError(f"{held} {skeleton.checkpoint.id}; give shorter ones.")
        return blocks

    def _teacher(self) -> Skeleton | None:
        """The teacher, not yet loaded. Raises MismatchError for one with another vocabulary."""
        options, skeleton = self.options, self.skeleton
        if not options.kl:
            return None
        how: dict[str, Any] = {"device": skeleton.device, "dtype": autocast_dtype(options, skeleton.device)}
        how["trust_remote_code"] = options.trust_remote_code
        if options.teacher is not None:
            found = open_model(options.teacher, replace(options, revision=None, device=str(skeleton.device)))
            found.dtype = how["dtype"]
        elif self.origin:
            near = at_hand(self.origin, **how)
            if near is None:
                name = (self.origin.get("model") or {}).get("id")
                self.remarks.append(f"{name}, which it came from, is not at hand: no teacher; --teacher names one")
                return None
            found = near
        else:
            found = Skeleton(skeleton.checkpoint, **how)
        check_vocabulary(found, skeleton)
        return found

    def key(self) -> dict[str, Any]:
        """What the result depends on."""
        document = self.options.document()
        return {
            "options": {name: value for name, value in document.items() if name not in HOW_IT_RAN},
            "model": self.skeleton.fingerprint.document(),
            "masks": {name: self.masks.entry(name)["keep_sha256"] for name in self.masks.names} if self.masks else None,
            "samples": [tensor_digest(part) for part in self.samples],
            "teacher": self.teacher.fingerprint.document() if self.teacher else None,
        }

    def train(self, folder: Path) -> tuple[Any, list[Record]]:
        """Load, train; returns the outcome and its records."""
        options, skeleton = self.options, self.skeleton
        skeleton.load_everything()
        teacher = None
        if self.teacher is not None:
            self.teacher.load_everything()
            teacher = Teacher(self.teacher.model, self.teacher.checkpoint.id)
        task = modes.Task(
            skeleton,
            self.linears,
            options,
            self.samples,
            teacher,
            self.plan.steps,
            self.plan.learned,
            folder,
            self.progress,
            self.note,
        )
        if options.mode == "admm":
            assert self.goal is not None
            outcome = modes.train_admm(task, self.goal.budget)
        else:
            assert self.masks is not None
            keep_of = self.masks.keep
            outcome = modes.train_lora(task, self.chosen, keep_of) if self.chosen else modes.train_full(task, keep_of)
        if not outcome.records[-1].best:
            before = outcome.records[-1].before
            self.remarks.append(f"no step was better than before ({before:.4f} nats held out), so the weights stay")
        return outcome, outcome.records

    def write(self, output: Path, outcome: modes.Outcome, *, force: bool) -> dict[str, Any]:
        """Write what came of it; returns its `trim.json`."""
        training = {
            "mode": self.options.mode,
            "phases": [record.document() for record in outcome.records],
            "teacher": self.plan.teacher,
            "trained_from": self.skeleton.fingerprint.document(),
            "remarks": self.remarks,
        }
        entries = {
            linear.name: self.goal.entry(linear) if self.goal else self.masks.entry(linear.name)  # type: ignore[union-attr]
            for linear in self.linears
        }
        trained = Trained(self.skeleton, self.options, self.origin, entries, outcome, training)
        return trained.write(output, force=force, progress=self.progress)
