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
from trimcli.methods.presets import PRESETS
from trimcli.methods.recipe import Recipe
from trimcli.options import words

SAMPLES, SEQLEN, WINDOWS = 64, 128, 120
# A row of the demo each: label -> a recipe and its layer allocation. Those of the first part leave the weights as they
# are, those of the second change the ones that stay; what others published comes first in both.
VARIANTS: dict[str, tuple[Recipe, str | None]] = {
    "magnitude": (Recipe(method="magnitude"), None),
    "wanda": (Recipe(), None),
    "wanda + OWL": (Recipe(), "owl"),
    "wanda + OWL + TRIM": (Recipe(rows="trim"), "owl"),
    "learned masks": (Recipe(refine="learned", refine_steps=32), "owl"),
    "SparseGPT": (Recipe(method="sparsegpt"), None),
    "SparseGPT + OWL": (Recipe(method="sparsegpt"), "owl"),
    "preset fast": (PRESETS["fast"].recipe(), None),
    "preset balanced": (PRESETS["balanced"].recipe(), "auto"),
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

    def measured(label: str, model: str, seconds: float = 0.0) -> DemoRow:
        options = EvaluateOptions(ppl=(str(texts.measurement),), seqlen=SEQLEN, max_windows=WINDOWS, **run)
        found = evaluate(model, options, directory / f"results-{_file(label)}.json", progress=progress)
        return DemoRow(label, found["perplexity"][0]["value"], found["sparsity"]["total"], seconds)

    ratios = {}
    for method in ("owl", "auto"):
        ratios[method] = directory / f"ratios-{method}.json"
        options = AllocateOptions(method=method, sparsity=sparsity, calibration=calibration, **run)
        tell("alloc-layers", ratios[method], *words(options))
        allocate(model, ratios[method], options, progress=progress)
    rows = [measured("dense", model)]
    pruned = {}
    for label, (recipe, allocation) in VARIANTS.items():
        masks, saved = directory / f"masks-{_file(label)}.safetensors", directory / f"pruned-{_file(label)}"
        read = calibration if recipe.needs else None
        target: dict[str, Any] = {"ratios": ratios[allocation]} if allocation else {"sparsity": sparsity}
        choice = PruneOptions(recipe=recipe, calibration=read, save_model=saved, **target, **run)
        tell("prune", masks, *prune_words(choice))
        rows.append(measured(label, str(saved), seconds=prune(model, masks, choice, progress=progress).seconds))
        pruned[label] = saved, masks
    best = min(rows[1:], key=lambda row: row.perplexity)
    saved, masks = pruned[best.label]
    packed = directory / "packed"
    # The directory holds the weights as they became, other ones than the masks were chosen for.
    say(f"trim apply-masks {saved.name} {masks.name} -o {packed.name} --format packed --other-weights")
    form = ApplyOptions(format="packed", other_weights=True)
    packed_form = apply_masks(str(saved), masks, packed, form, progress=progress)
    say(f"trim verify {saved.name}")
    verify(saved, progress=progress).check()
    nbytes = sum(path.stat().st_size for path in saved.glob("*.safetensors")), packed_form.nbytes
    return DemoResult(tuple(rows), best.label, *nbytes, directory, time.monotonic() - started)


def _file(label: str) -> str:
    return label.replace(" + ", "-").replace(" ", "-").lower()
