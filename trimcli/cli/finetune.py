"""`trim finetune`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimcli.cli.options import output
from trimcli.cli.output import Say, facts, memory, size

if TYPE_CHECKING:
    from trimcli.commands.finetune import FinetuneSummary
    from trimcli.training.options import FinetuneOptions
    from trimcli.training.plan import FinetunePlan


def finetune(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="A pruned or packed directory; under --mode admm also a dense model.")
    ],
    output: Annotated[Path, output("trained model directory")],
    options: "FinetuneOptions",
    say: Say,
) -> None:
    """Train a pruned model so that every zero stays, or learn the masks while training.

    Pruned weights stay zero whatever the optimizer does, and kept ones that pass through zero go on training: masks
    come from trim.json or --masks, not from the weights. The result is a pruned directory as apply-masks writes it.
    Weights of the least held-out loss stand. An ordinary merge of an adapter (peft's merge_and_unload) fills the
    zeros; --merge masked does not.

    A run that was stopped goes on with --resume. Several devices: torchrun --nproc-per-node K -m trimcli finetune ...

    Example: trim finetune Qwen2.5-3B-80 -o Qwen2.5-3B-80-tuned --mode full --steps 500

    Masks learned: trim finetune Qwen/Qwen2.5-3B -o Qwen2.5-3B-80 --mode admm --sparsity 0.8 --steps 2000
    """
    from trimcli.commands.finetune import finetune as run

    found = run(
        model,
        output,
        options,
        force=say.force,
        progress=say.progress,
        announce=lambda plan: say.note(_head(plan)),
        note=say.note,
    )
    say.result(lambda: asdict(found), lambda: _print(found))


def _head(plan: "FinetunePlan") -> str:
    """The plan in two lines."""
    learned = f", {plan.learned:,} of them to learn the masks" if plan.learned else ""
    course = f"{plan.steps:,} steps{learned}, {plan.tokens:,} tokens in samples of {plan.seqlen:,}"
    seen = f"{plan.epochs:.2g} times {plan.samples:,} samples, {plan.heldout:,} held out"
    held = f"; {plan.held:,} stay zero" if plan.held else ""
    teacher = f"teacher {plan.teacher}" if plan.teacher else "no teacher"
    room = f"about {size(plan.nbytes)} on {plan.device}"
    return f"{plan.model}, {plan.mode}: {course} ({seen})\n{plan.trained:,} weights train{held}; {teacher}; {room}"


def _print(found: "FinetuneSummary") -> None:
    stands = f"step {found.best} stands" if found.best else "the weights stay as they were"
    stopped = ", stopped early" if found.stopped_early else ""
    zeros = f"{found.sparsity:.4%} of {found.linears} linears ({found.zeros:,} zeros)" if found.sparsity else None
    plain = "a plain peft adapter: loaded beside the model it keeps every zero, merge_and_unload would fill them"
    facts(
        {
            "model": f"{found.output} ({size(found.nbytes)})",
            "sparsity": zeros,
            "trained": f"{found.mode}, {found.steps:,} steps, {found.tokens:,} tokens{stopped}",
            "held-out loss": f"{found.before:.4f} before, {found.after:.4f} after; {stands}",
            "teacher": found.teacher,
            "note": "; ".join([*([] if zeros else [plain]), *found.remarks]) or None,
            "seconds": f"{found.seconds:.1f}",
            "peak memory": memory(found.peak_memory),
        }
    )
