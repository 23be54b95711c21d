"""`trim demo`: every stage on the embedded model, offline: methods side by side, then the files of the best one."""

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimcli.commands.allocate import allocate
from trimcli.commands.apply import apply_masks
from trimcli.commands.calibrate import calibrate
from trimcli.commands.evaluate import evaluate
from trimcli.commands.options import (
    AllocateOptions,
    ApplyOptions,
    CalibrateOptions,
    EvaluateOptions,
    PruneOptions,
    prune_words,
)
from trimcli.commands.prune import prune
from trimcli.commands.verify import verify
from trimcli.console import NO_PROGRESS, Progress
from trimcli.demo import MODEL, write_texts
from trimcli.methods.recipe import Recipe
from trimcli.options import words

SAMPLES, SEQLEN, WINDOWS = 64, 128, 240
# A row of the demo each: label -> method, layer allocation, and how sparsity is shared among rows.
VARIANTS = {
    "magnitude": ("magnitude", None, "even"),
    "wanda": ("wanda", None, "even"),
    "wanda + OWL": ("wanda", "owl", "even"),
    "wanda + Alpha": ("wanda", "alpha", "even"),
    "wanda + TRIM": ("wanda", None, "trim"),
    "wanda + OWL + TRIM": ("wanda", "owl", "trim"),
}


@dataclass(frozen=True)
class DemoRow:
    """One measured row: perplexity on the held-back topics, achieved sparsity, seconds of pruning."""

    label: str
    perplexity: float
    sparsity: float
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """rows: dense first. best: label of the best pruned row. dense_bytes, packed_bytes: of its directories."""

    rows: tuple[DemoRow, ...]
    best: str
    dense_bytes: int
    packed_bytes: int
    directory: Path
    seconds: float


def demo(
    directory: Path,
    sparsity: float,
    *,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = NO_PROGRESS,
    say: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Run the stages into `directory`, which must exist and be empty. say: is told each stage's command line."""
    started = time.monotonic()
    texts = write_texts(directory)
    model = str(MODEL)
    run: dict[str, Any] = {"device": device, "seed": seed, "cache_dir": directory / "cache"}
    calibration = directory / "calibration.safetensors"

    def tell(command: str, output: Path, *words: str) -> None:
        line = shlex.join(["trim", command, "MODEL", "-o", str(output), *words])
        say(line.replace(f"{directory}/", "").replace(" --cache-dir cache", ""))

    drawn = CalibrateOptions(dataset=str(texts.calibration), nsamples=SAMPLES, seqlen=SEQLEN, **run)
    tell("calibrate", calibration, *words(drawn))
    calibrate(model, calibration, drawn, progress=progress)

    def measured(label: str, masks: Path | None, seconds: float) -> DemoRow:
        options = EvaluateOptions(masks=masks, ppl=(str(texts.measurement),), seqlen=SEQLEN, max_windows=WINDOWS, **run)
        output = directory / f"results-{_file(label)}.json"
        found = evaluate(model, options, output, progress=progress)
        return DemoRow(label, found["perplexity"][0]["value"], found["sparsity"]["total"], seconds)

    ratios = {}
    for method in ("owl", "alpha"):
        ratios[method] = directory / f"ratios-{method}.json"
        read = calibration if method == "owl" else None
        options = AllocateOptions(method=method, sparsity=sparsity, calibration=read, **run)
        tell("alloc-layers", ratios[method], *words(options))
        allocate(model, ratios[method], options, progress=progress)
    rows = [measured("dense", None, 0.0)]
    masks = {}
    for label, (method, allocation, among) in VARIANTS.items():
        masks[label] = directory / f"masks-{_file(label)}.safetensors"
        recipe = Recipe(method=method, rows=among)
        target: dict[str, Any] = {"ratios": ratios[allocation]} if allocation else {"sparsity": sparsity}
        read = calibration if recipe.needs else None
        choice = PruneOptions(recipe=recipe, calibration=read, **target, **run)
        tell("prune", masks[label], *prune_words(choice))
        summary = prune(model, masks[label], choice, progress=progress)
        rows.append(measured(label, masks[label], summary.seconds))
    best = min(rows[1:], key=lambda row: row.perplexity)
    pruned, packed = directory / "pruned", directory / "packed"
    say(f"trim apply-masks MODEL {masks[best.label].name} -o {pruned.name}")
    dense_form = apply_masks(model, masks[best.label], pruned, progress=progress)
    say(f"trim apply-masks MODEL {masks[best.label].name} -o {packed.name} --format packed")
    packed_form = apply_masks(model, masks[best.label], packed, ApplyOptions(format="packed"), progress=progress)
    say(f"trim verify {pruned.name}")
    verify(pruned, progress=progress).check()
    nbytes = dense_form.nbytes, packed_form.nbytes
    return DemoResult(tuple(rows), best.label, *nbytes, directory, time.monotonic() - started)


def _file(label: str) -> str:
    return label.replace(" + ", "-").lower()
