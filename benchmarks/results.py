"""Perplexity of the published combinations, every method under every layer allocation, as a Markdown file.

    python -m benchmarks.results --model DIR --calibrate TRAIN.json.gz --measure TEST.txt HELDOUT.json.gz \
        --windows 300 --seqlen 256 --runs runs.jsonl --out benchmarks/RESULTS.md

Finished runs are noted in --runs as they come: a stopped study goes on where it was, and `--shard 0/2` and
`--shard 1/2` share it between two processes. `--render` only writes the tables.
"""

import argparse
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.support.ledger import Ledger
from benchmarks.support.provenance import head, publish, table
from benchmarks.support.study import Study, add_arguments, make_study, ratios_name
from trimcli import BarberOptions, PruneOptions, Recipe, prune

ALLOCATIONS = {"uniform": "uniform", "owl": "OWL", "alpha": "Alpha"}

LEGEND = (
    "Bold: the lowest of its column, over all layer allocations. OWL and Alpha are `trim alloc-layers` with "
    "`--method owl --calibration FILE` and with `--method alpha` at the sparsity; their time is not in the seconds. "
    "Barber's percentage is its `--threshold`; the default 1% swaps nothing in a row with fewer than a hundred "
    "improving pairs. Its kept weights are the dense ones, where *retained* those that SparseGPT left."
)


@dataclass(frozen=True)
class Setting:
    """One row of the tables at one target; the dense model is the setting without a target.

    barber: LLM-Barber's second pass, if it follows. sparsity or pattern (N:M): the target.
    """

    method: str = "wanda"
    rows: bool = False
    barber: BarberOptions | None = None
    allocation: str = "uniform"
    sparsity: float | None = None
    pattern: str | None = None

    @property
    def name(self) -> str:
        """The method as the tables call it."""
        if self.sparsity is None and self.pattern is None:
            return "dense"
        if self.rows:
            return "TRIM (wanda + rows)" if self.method == "wanda" else f"{self.method} + TRIM rows"
        if self.barber:
            retained = ", retained" if self.barber.retain_reconstruction else ""
            return f"{self.method} + Barber {self.barber.threshold:.0%}{retained}"
        return self.method

    @property
    def column(self) -> str:
        """The target as the tables head it."""
        return self.pattern or f"{(self.sparsity or 0) * 100:g}%"

    def options(self) -> str:
        """The options of `trim prune` that make it, but for model, calibration and outputs."""
        words = ["--method", self.method]
        if self.pattern:
            words += ["--sparsity-type", self.pattern]
        elif self.allocation != "uniform":
            words += ["--ratios", ratios_name(self.allocation, self.sparsity or 0)]
        else:
            words += ["--sparsity", f"{self.sparsity:g}"]
        words += ["--use-trim"] if self.rows else []
        if self.barber:
            words += ["--prune-barber", "--threshold", f"{self.barber.threshold:g}"]
            words += ["--retain-reconstruction"] if self.barber.retain_reconstruction else []
        return shlex.join(words)

    def prune_options(self, study: Study) -> PruneOptions:
        """The same as the library takes it, without outputs."""
        recipe = Recipe(method=self.method, rows="trim" if self.rows else "even", barber=self.barber)
        allocated = not self.pattern and self.allocation != "uniform"
        walks = self.method != "magnitude" or self.rows or self.barber
        return PruneOptions(
            recipe=recipe,
            sparsity=None if self.pattern or allocated else self.sparsity,
            sparsity_type=self.pattern or "unstructured",
            ratios=study.ratios(self.allocation, self.sparsity or 0) if allocated else None,
            calibration=study.calibration() if walks else None,
        )


@dataclass(frozen=True)
class Run:
    """A finished setting: perplexity by text, sparsity read back from the weights, processor seconds of the prune."""

    perplexity: dict[str, float]
    sparsity: float
    seconds: float


def settings(
    sparsities: Iterable[float], patterns: Iterable[str], thresholds: Sequence[float], *, more: bool = False
) -> list[Setting]:
    """The dense model and every combination of the study, in the order of the tables.

    thresholds: shares of a unit's improving pairs that LLM-Barber swaps, each a row of the tables. more: combinations
    that were never published, too.
    """
    found = [Setting()]
    for sparsity in sparsities:
        at = partial(Setting, sparsity=sparsity)
        for allocation in ALLOCATIONS:
            within = partial(at, allocation=allocation)
            found += [within(method="magnitude"), within(), within(rows=True), within(method="sparsegpt")]
        found += [at(method="sparsegpt", rows=True)] if more else []
        found += _with_barber(at, thresholds, more=more)
    for pattern in patterns:
        by = partial(Setting, pattern=pattern)
        found += [by(method="magnitude"), by(), by(method="sparsegpt"), *_with_barber(by, thresholds, more=more)]
    return found


def _with_barber(target: Any, thresholds: Sequence[float], *, more: bool) -> list[Setting]:
    found = []
    for threshold in thresholds:
        dense = BarberOptions(threshold=threshold)
        retained = BarberOptions(threshold=threshold, retain_reconstruction=True)
        found += [target(barber=dense), target(method="sparsegpt", barber=dense)]
        found += [target(method="sparsegpt", barber=retained)] if more else []
    return found


def run(study: Study, setting: Setting) -> Run:
    """Prune and measure one setting; masks and model are thrown away."""
    if setting.name == "dense":
        return Run(**study.measure(study.model), seconds=0.0)
    with tempfile.TemporaryDirectory(dir=study.folder) as folder:
        masks, pruned = Path(folder) / "masks.safetensors", Path(folder) / study.model.name
        # A cache of its own: another process may be in the same first pass, before its own second one.
        options = replace(setting.prune_options(study), cache_dir=Path(folder) / "cache")
        if options.recipe.changes_weights:
            options = replace(options, save_model=pruned)
        started = time.process_time()
        prune(str(study.model), masks, options)
        seconds = time.process_time() - started
        measured = study.measure(pruned) if options.save_model else study.measure(study.model, masks)
    return Run(**measured, seconds=seconds)


def key(study: Study, setting: Setting) -> dict[str, Any]:
    """What a finished run is found again by."""
    return {**study.key, "setting": setting.name if setting.name == "dense" else setting.options()}


def render(study: Study, wanted: list[Setting], found: dict[Setting, Run]) -> list[str]:
    """The results file."""
    missing = len(wanted) - len(found)
    facts = {
        "model": study.name,
        **study.facts(),
        "computed in": f"{study.dtype}, exact numerics, pruned weights propagate",
        **({"unfinished": f"{missing} of {len(wanted)} runs are missing"} if missing else {}),
    }
    lines = head("Perplexity of pruned models", "results", facts)
    lines += [LEGEND, ""]
    for text in (path.name for path in study.texts):
        for title, mine in (("unstructured", _unstructured(wanted)), ("N:M", _patterns(wanted))):
            if mine:
                lines += [f"## {text}: {title}", "", *_summary(text, mine, found), ""]
    lines += ["## Every run", "", "Options of `trim prune`; sparsity as read back from the weights.", ""]
    columns = ("options", "sparsity", *(path.name for path in study.texts), "prune, CPU s")
    return [*lines, *table(columns, _details(study, wanted, found))]


def _unstructured(wanted: list[Setting]) -> list[Setting]:
    return [setting for setting in wanted if setting.sparsity is not None]


def _patterns(wanted: list[Setting]) -> list[Setting]:
    return [setting for setting in wanted if setting.pattern]


def _summary(text: str, mine: list[Setting], found: dict[Setting, Run]) -> list[str]:
    columns = list(dict.fromkeys(setting.column for setting in mine))
    order = list(ALLOCATIONS)
    kinds = dict.fromkeys((setting.allocation, setting.name) for setting in mine)
    values = {
        (setting.allocation, setting.name, setting.column): found[setting].perplexity[text]
        for setting in mine
        if setting in found
    }
    best = {
        column: min((value for (*_, at), value in values.items() if at == column), default=math.nan)
        for column in columns
    }
    dense = found.get(Setting())
    rows = [["dense", "", *[shown(dense.perplexity[text] if dense else None)] * len(columns)]]
    for allocation, name in sorted(kinds, key=lambda kind: order.index(kind[0])):
        cells = []
        for column in columns:
            value = values.get((allocation, name, column))
            cells.append(f"**{shown(value)}**" if value == best[column] else shown(value))
        rows.append([name, ALLOCATIONS[allocation], *cells])
    return table(("method", "layers", *columns), rows)


def _details(study: Study, wanted: list[Setting], found: dict[Setting, Run]) -> Iterable[list[str]]:
    for setting in wanted:
        if setting not in found:
            continue
        made, dense = found[setting], setting.name == "dense"
        yield [
            "dense" if dense else f"`{setting.options()}`",
            f"{made.sparsity:.4%}",
            *(shown(made.perplexity[path.name]) for path in study.texts),
            "" if dense else f"{made.seconds:.1f}",
        ]


def shown(value: float | None) -> str:
    """A perplexity to four figures or so, a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def main() -> None:
    """Run what this process's share of the study lacks, and write the tables when all is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="model directory (default: the embedded one)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--calibrate", type=Path, help="calibration text (default: the demo's)")
    source.add_argument("--tokens", type=Path, help="calibration samples, safetensors")
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--patterns", nargs="*", default=["2:4", "4:8"])
    parser.add_argument(
        "--thresholds", nargs="*", type=float, default=[0.01, 0.1], help="LLM-Barber's, each a row of the tables"
    )
    parser.add_argument("--more", action="store_true", help="never published combinations, too")
    parser.add_argument("--shard", default="0/1", help="this process's share, I/N with I from 0")
    parser.add_argument("--render", action="store_true", help="write the tables of what is finished, run nothing")
    add_arguments(parser)
    given = parser.parse_args()
    share, shares = map(int, given.shard.split("/"))
    study = make_study(given, given.model, given.calibrate or given.tokens)
    ledger = Ledger(given.runs or study.folder / "results.jsonl")
    wanted = settings(given.sparsities, given.patterns, given.thresholds, more=given.more)
    for place, setting in enumerate([] if given.render else wanted):
        if place % shares == share and ledger.find(key(study, setting)) is None:
            made = run(study, setting)
            ledger.add(key(study, setting), vars(made))
            values = ", ".join(map(shown, made.perplexity.values()))
            print(
                f"{place + 1}/{len(wanted)} {setting.name} {key(study, setting)['setting']}: {values} "
                f"in {made.seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    found = {setting: Run(**facts) for setting in wanted if (facts := ledger.find(key(study, setting)))}
    if given.render or len(found) == len(wanted):
        publish(render(study, wanted, found), given.out)


if __name__ == "__main__":
    main()
