"""Damage at equal counts of zeros: the published combinations and the presets, several calibration draws each.

    python -m benchmarks.quality --model DIR --calibrate TRAIN.json.gz --measure HELDOUT.txt TEST.txt \
        --nsamples 128 --seqlen 256 --windows 120 --draws 3 --runs benchmarks/quality-runs.jsonl
    python -m benchmarks.quality --render --runs benchmarks/quality-runs.jsonl --out benchmarks/QUALITY.md

The first line runs what one model lacks, and notes each run as it ends: stopped, it goes on where it was, and
`--shard 0/2` and `--shard 1/2` share it between two processes. The second writes tables and plots of all that was
noted.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.support.ledger import Ledger
from benchmarks.support.provenance import machine, publish, versions
from benchmarks.support.quality_tables import render
from benchmarks.support.study import Study, add_arguments, make_study
from trimcli import AllocateOptions, PruneOptions, Recipe, prune
from trimcli.methods.presets import PRESETS

ORIGINAL, UPDATED = "original weights", "updated weights"


@dataclass(frozen=True)
class Method:
    """A row of the tables. weights: its class. published: whether it is others'. recipe: fields of a Recipe.

    whole: fields that an N:M pattern rules out, as it does an allocation. own: of the samples, what the model writes.
    """

    label: str
    weights: str
    published: bool
    recipe: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)
    alloc: str | None = None
    own: float = 0.0

    def options(self, target: str, study: Study) -> PruneOptions:
        """The options of `trim prune` at a target, a sparsity or N:M."""
        pattern = ":" in target
        recipe = Recipe(**self.recipe, **({} if pattern else self.whole))
        run: dict[str, Any] = {"cache_dir": study.cache, "dtype": study.compute, "seed": study.seed}
        sparsity = None if pattern else float(target)
        allocate = None
        if self.alloc and not pattern:
            allocate = AllocateOptions(method=self.alloc, sparsity=sparsity, **run)
        return PruneOptions(
            recipe=recipe,
            sparsity=sparsity,
            sparsity_type=target if pattern else "unstructured",
            allocate=allocate,
            calibration=study.calibration(self.own),
            **run,
        )


def _preset(name: str, besides: str = "", **more: Any) -> Method:
    one = PRESETS[name]
    return Method(f"preset {name}{besides}", UPDATED, False, {**one.fields, **more}, dict(one.whole), one.alloc)


def _half_own(label: str) -> Method:
    """A row again, half of whose samples the dense model writes."""
    one = next(method for method in ROWS if method.label == label)
    return replace(one, label=f"{label}, half the samples the model's own", own=0.5)


# How reconstruction trained before its rate, its steps and its target were measured, on samples of 256 tokens.
AT_FIRST = {"reconstruct_lr": 0.02, "reconstruct_batch": 8, "reconstruct_blend": 0.0}
ROWS = [
    Method("magnitude", ORIGINAL, True, {"method": "magnitude"}),
    Method("wanda", ORIGINAL, True),
    Method("wanda + TRIM", ORIGINAL, True, whole={"rows": "trim"}),
    Method("wanda + OWL", ORIGINAL, True, alloc="owl"),
    Method("wanda + OWL + TRIM", ORIGINAL, True, whole={"rows": "trim"}, alloc="owl"),
    Method("SparseGPT", UPDATED, True, {"method": "sparsegpt"}),
    Method("SparseGPT + OWL", UPDATED, True, {"method": "sparsegpt"}, alloc="owl"),
    Method("swaps on wanda + OWL + TRIM", ORIGINAL, False, {"refine": "swaps"}, {"rows": "trim"}, "owl"),
    Method("learned masks, search", ORIGINAL, False, {"refine": "learned"}, {}, "search"),
    *(_preset(name) for name in ("fast", "balanced", "best")),
    _preset("best", ", 3,072 steps", reconstruct_steps=3072),
    _preset("balanced", ", then reconstruction", reconstruct="layer"),
    _preset("balanced", " at first, then 64 steps", reconstruct="layer", reconstruct_steps=64, **AT_FIRST),
    _preset("best", " at first, 152 steps", reconstruct_steps=152, **AT_FIRST),
    _preset("best", " at first, 192 steps", reconstruct_steps=192, **AT_FIRST),
    _preset(
        "best", " at first, 512 steps of 32 samples", reconstruct_steps=512, **AT_FIRST | {"reconstruct_batch": 32}
    ),
]
HALF_OWN = [
    "SparseGPT",
    "SparseGPT + OWL",
    "preset balanced at first, then 64 steps",
    "preset best at first, 152 steps",
    "preset best",
]
METHODS = [*ROWS, *map(_half_own, HALF_OWN)]


def run(study: Study, method: Method, target: str) -> dict[str, Any]:
    """Prune and measure: what `Study.measure` finds, and seconds of the prune."""
    with tempfile.TemporaryDirectory(dir=study.folder) as folder:
        masks, pruned = Path(folder) / "masks.safetensors", Path(folder) / study.model.name
        options = replace(method.options(target, study), save_model=pruned)
        started = time.perf_counter()
        prune(str(study.model), masks, options)
        seconds = time.perf_counter() - started
        return {**study.measure(pruned), "seconds": seconds}


def cases(given: argparse.Namespace, draws: list[Study]) -> Iterator[tuple[Study, Method, str]]:
    """What is asked for, the first draw of everything first."""
    for study in draws:
        for target in given.targets:
            for method in METHODS:
                skipped = ":" in target and (method.alloc or method.whole) and method.published
                skipped = bool(skipped or (method.own and study.fixed))
                if not skipped and (not given.methods or method.label in given.methods):
                    yield study, method, target


def key(study: Study, method: Method, target: str) -> dict[str, Any]:
    """What a run is found again by."""
    recipe = Recipe(**method.recipe, **({} if ":" in target else method.whole)).document()
    own = {"self_share": method.own} if method.own else {}
    return {**study.key, "draw": study.seed, "target": target, "recipe": recipe, "alloc": method.alloc, **own}


def main() -> None:
    """Run what this process's share lacks, or write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="model directory (default: the embedded one)")
    parser.add_argument("--calibrate", type=Path, help="calibration text (default: the demo's)")
    parser.add_argument("--targets", nargs="*", default=["0.5", "0.6", "0.7", "0.8", "2:4"], help="sparsities or N:M")
    parser.add_argument("--methods", nargs="*", help="only these rows of the tables, by label")
    parser.add_argument("--draws", type=int, default=3, help="calibration draws, from the seeds 0, 1, 2, ...")
    parser.add_argument("--dtype", default="auto", help="of the computation")
    parser.add_argument("--questions", type=int, default=0, help="of a zero-shot task made of the last text")
    parser.add_argument("--shard", default="0/1", help="this process's share, I/N with I from 0")
    parser.add_argument("--render", action="store_true", help="write tables and plots of what was noted, run nothing")
    add_arguments(parser)
    given = parser.parse_args()
    if given.render:
        publish(render(list(Ledger(given.runs)), given.out), given.out)
        return
    share, shares = map(int, given.shard.split("/"))
    base = replace(make_study(given, given.model, given.calibrate), compute=given.dtype, questions=given.questions)
    ledger = Ledger(given.runs or base.folder / "quality.jsonl")
    draws = [replace(base, seed=draw) for draw in range(given.draws)]
    about = {**base.facts(), "model": base.name, "versions": versions(), "machine": machine(), "dtype": given.dtype}
    dense = {**base.key, "target": "dense"}
    if ledger.find(dense) is None and share == 0:
        ledger.add(dense, {**about, "label": "dense", "target": "dense", **base.measure(base.model)})
    for place, (study, method, target) in enumerate(cases(given, draws)):
        wanted = key(study, method, target)
        if place % shares != share or ledger.find(wanted) is not None:
            continue
        made = run(study, method, target)
        named = {"label": method.label, "weights": method.weights, "published": method.published, "target": target}
        named |= {"self_share": method.own} if method.own else {}
        ledger.add(wanted, {**about, **named, "draw": study.seed, **made})
        values = ", ".join(f"{value:.2f}" for value in made["perplexity"].values())
        print(
            f"{target} draw {study.seed} {method.label}: {values} in {made['seconds']:.1f} s",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()
