"""What `trim finetune` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trimcli.errors import OptionError
from trimcli.methods.choice import parse_pattern
from trimcli.options import LimitedOptions, above_zero, at_least, fraction, not_negative, option, positive
from trimcli.text.encoding import Bos
from trimcli.text.options import BOS, CHAT, DATASET, SEQLEN, TOKENS
from trimcli.text.stdin import check_stdin

Mode = Literal["lora", "full", "admm"]
SAMPLES, COURSE, ADAPTERS = "Samples", "Course of the training", "Adapters (--mode lora)"
TEACHER, LEARNED = "Teacher", "Learned masks (--mode admm)"
# Learning rates by mode: an adapter, of which little is trained, bears more.
RATES = {"lora": 2e-4, "full": 1e-4, "admm": 1e-4}
PATTERN = "unstructured, or N:M: N weights are KEPT of each M consecutive inputs (2:4, 4:8, ...)."


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(LimitedOptions):
    """What to train, on what, and for how long."""

    mode: Mode = option(
        "lora",
        "lora: small adapters, whose product the masks hold, too. full: every kept weight; memory is 16 bytes for "
        "each of the model's, kept or not. admm: the masks are learned while all weights train, then full on what was "
        "found.",
    )
    masks: Path | None = option(None, "A masks file of `trim prune`; what trim.json tells if not given.")
    format: Literal["dense", "packed"] | None = option(
        None, "dense: an ordinary directory. packed: keep bits and kept values. As the input if not given."
    )
    dataset: str = option("c4", f"{DATASET} One part in sixteen, at most 64 samples, is held out.", panel=SAMPLES)
    nsamples: int = option(4096, "At most so many samples.", panel=SAMPLES, check=at_least(2))
    seqlen: int | None = option(None, f"Tokens a sample; {SEQLEN}", panel=SAMPLES, check=at_least(2))
    tokens: Path | None = option(None, TOKENS, panel=SAMPLES)
    bos: Bos = option("auto", BOS, panel=SAMPLES)
    chat: bool = option(False, CHAT, panel=SAMPLES)
    epochs: float | None = option(None, "How often samples are seen: 1 if not given.", panel=COURSE, check=above_zero)
    steps: int | None = option(None, "Optimizer steps, in the place of --epochs.", panel=COURSE, check=positive)
    batch_size: int = option(4, "Samples a pass, on each device.", panel=COURSE, check=positive)
    accumulate: int = option(4, "Passes a step: their gradients are added up.", panel=COURSE, check=positive)
    lr: float | None = option(
        None, "Highest learning rate; 2e-4 for lora, 1e-4 else, if not given.", panel=COURSE, check=above_zero
    )
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "How the learning rate falls after the warmup.", panel=COURSE
    )
    warmup: float = option(0.05, "The share of the steps in which the rate rises.", panel=COURSE, check=fraction)
    weight_decay: float = option(0.0, "AdamW's weight decay.", panel=COURSE, check=not_negative)
    clip: float = option(1.0, "Largest norm of a step's gradient; 0 for any.", panel=COURSE, check=not_negative)
    freeze_embeddings: bool = option(False, "Leave embeddings and head as they are.", panel=COURSE)
    gradient_checkpointing: bool = option(
        False, "Compute activations anew on the way back: less memory, a third more time.", panel=COURSE
    )
    every: int | None = option(
        None,
        "Steps between looks at the held-out samples, each of which saves a checkpoint; a tenth of all if not given.",
        panel=COURSE,
        check=positive,
    )
    patience: int = option(
        3, "Stop after so many looks without a better held-out loss; the best stands.", panel=COURSE, check=positive
    )
    resume: bool = option(False, "Go on from the last checkpoint of this command's interrupted run.", panel=COURSE)
    rank: int = option(8, "Rank of the adapters.", panel=ADAPTERS, check=positive)
    alpha: float = option(16.0, "Their product is scaled by alpha / rank.", panel=ADAPTERS, check=above_zero)
    dropout: float = option(0.05, "Dropout of the adapters' inputs.", panel=ADAPTERS, check=fraction)
    targets: tuple[str, ...] = option(
        (),
        "Ends of the names of linears that get adapters, separated by commas, or all; q_proj,v_proj if not given, and "
        "all where there are none such.",
        panel=ADAPTERS,
    )
    merge: Literal["masked", "none"] = option(
        "masked",
        "masked: adapters are trained under the masks and merged into the kept weights. none: write a plain peft "
        "adapter, trained without masks as peft computes it; merging it fills the zeros.",
        panel=ADAPTERS,
    )
    teacher: str | None = option(
        None,
        "A model of the same vocabulary whose logits are learned, too; the dense model that the directory came from "
        "if not given and at hand.",
        panel=TEACHER,
    )
    kl: float = option(
        1.0, "Weight of the Kullback-Leibler divergence to the teacher; 0 for none.", panel=TEACHER, check=not_negative
    )
    sparsity: float | None = option(
        None, "Share of the whole model's weights to prune; as the pruned model has if not given.", panel=LEARNED,
        check=fraction,
    )  # fmt: skip
    sparsity_type: str = option("unstructured", PATTERN, panel=LEARNED)
    ratios: Path | None = option(None, "Layer sparsities: a file of `trim alloc-layers`.", panel=LEARNED)
    interval: int = option(32, "Steps between projections of the weights.", panel=LEARNED, check=positive)
    penalty: float = option(
        0.01, "Pull towards the projection at the start; it grows.", "--lambda", panel=LEARNED, check=above_zero
    )
    polish: float = option(
        0.5, "The share of the steps that trains the kept weights under the masks found.", panel=LEARNED, check=fraction
    )

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return RATES[self.mode] if self.lr is None else self.lr

    def check(self) -> None:
        """Raise OptionError for values and combinations that cannot be used."""
        super().check()
        pattern = parse_pattern(self.sparsity_type)
        learned = {
            "--sparsity": self.sparsity is not None,
            "--sparsity-type": pattern is not None,
            "--ratios": self.ratios is not None,
        }
        chosen = [flag for flag, given in learned.items() if given]
        drawn = {"--bos": self.bos != "auto", "--chat": self.chat}
        refused = [
            (self.steps and self.epochs, "--steps with --epochs: each says for how long"),
            (self.mode != "admm" and chosen, f"{' with '.join(chosen)} with --mode {self.mode}, whose masks are given"),
            (len(chosen) > 1, f"{' with '.join(chosen)}: each says what goes"),
            (self.mode != "lora" and self.targets, f"--targets with --mode {self.mode}, which trains all"),
            (self.mode != "lora" and self.merge == "none", f"--merge none with --mode {self.mode}: it has no adapter"),
            (self.merge == "none" and self.format, f"--format {self.format} with --merge none: an adapter is written"),
            (self.teacher and not self.kl, "--teacher with --kl 0, which does not listen to it"),
            *((self.tokens and given, f"{flag} with --tokens: no text is read") for flag, given in drawn.items()),
        ]
        for wrong, what in refused:
            if wrong:
                raise OptionError(f"these options do not go together: {what}; leave one of them out.")
        check_stdin((self.dataset, self.tokens))
