"""The grid of a sweep: its options and its points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from trimcli.commands.options import BATCH, ONLY, SELF, SKIP, AllocateOptions, CalibrateOptions, PruneOptions
from trimcli.errors import OptionError
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.named import methods
from trimcli.methods.recipe import Recipe
from trimcli.methods.rows.base import ROWS
from trimcli.methods.scores import SCORES
from trimcli.methods.stats import STATISTICS
from trimcli.methods.updates.base import UPDATES
from trimcli.options import Numerics, WalkOptions, at_least, declared, fraction, one_of, option, positive
from trimcli.registry import Entry, option_types

GRID, SAMPLES = "The grid (values separated by commas)", "Samples"
SAVED_SAMPLES = "Samples from this file (a calibration file is one): the last ones measure, the others calibrate."


def axes() -> list[type[Any]]:
    """The option classes whose fields are axes of a grid: those of every method and allocation."""
    registries = (ROWS, SCORES, UPDATES, STATISTICS, ALLOCATIONS)
    return option_types(*(entry for registry in registries for entry in registry.values()))


@dataclass(frozen=True, kw_only=True)
class SweepOptions(WalkOptions):
    """A grid, and what all of it has in common. settings: the values of methods' and allocations' options, by field."""

    sparsity: float = option(..., "The fraction to prune, in [0, 1); the same in every run.", check=fraction)
    method: tuple[str, ...] = option(("wanda",), "Methods.", panel=GRID, choices=methods)
    alloc: tuple[str, ...] = option(
        ("uniform", "owl", "alpha"), "Layer allocations.", panel=GRID, choices=lambda: ALLOCATIONS
    )
    trim: tuple[bool, ...] = option((False, True), "With TRIM's row search (on), without (off).", panel=GRID)
    input_recalc: bool = option(False, "Collect last-token inputs anew once the linears before are pruned.")
    dataset: str = option("c4", "c4, wikitext2, ptb (their training text), a FILE or hf:NAME.", panel=SAMPLES)
    nsamples: int = option(256, "Calibration samples.", panel=SAMPLES, check=positive)
    seqlen: int | None = option(None, "Tokens a sample, as for calibrate.", panel=SAMPLES, check=at_least(2))
    tokens: Path | None = option(None, SAVED_SAMPLES, panel=SAMPLES)
    holdout: int = option(32, "Samples of the same text held out, to measure on.", panel=SAMPLES, check=positive)
    numerics: Numerics = option("exact", "exact: counts hold to the weight. reference: the published arithmetic.")
    propagate: bool = option(True, "Use the dense model's statistics.", "--no-propagate", off=True)
    metrics_cache: Path | None = option(None, "Alpha's metrics file.")
    only: tuple[str, ...] = option((), ONLY, repeated=True)
    skip: tuple[str, ...] = option((), SKIP, repeated=True)
    batch_size: int | None = option(None, BATCH, check=positive)
    resume: bool = option(True, "Measure anew what an earlier sweep has measured.", "--no-resume", off=True)
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise OptionError for values and combinations that cannot be used, before anything is read."""
        super().check()
        for axis in ("method", "alloc", "trim"):
            if not getattr(self, axis):
                raise OptionError(f"--{axis} names nothing to try; give at least one value.")
        known = [(kind, one) for kind in axes() for one in declared(kind)]
        for name in self.settings:
            one_of("the setting", name, (one.field for _, one in known))
        recipes = [Recipe(method=one, rows="trim" if trim else "even") for one in self.method for trim in self.trim]
        chosen = [*(ALLOCATIONS[name] for name in self.alloc), *(entry for one in recipes for entry in one.entries)]
        brought = {one.field for kind in option_types(*chosen) for one in declared(kind)}
        for kind, one in known:
            if one.field in self.settings and one.field not in brought:
                other = "--trim on" if ROWS["trim"].options is kind else "a --method that takes it, such as sparsegpt"
                brings = [f"--alloc {name}" for name, entry in ALLOCATIONS.items() if entry.options is kind]
                what = f"{one.spelled} does nothing without {next(iter(brings), other)}"
                raise OptionError(f"{what}; add it or leave {one.spelled} out.")
        if self.input_recalc and True not in self.trim:
            raise OptionError("--input-recalc does nothing without --trim on; add it or leave it out.")
        if self.dataset == SELF:
            once = f"trim calibrate --dataset {SELF} -o FILE, then --tokens FILE here"
            raise OptionError(
                f"--dataset {SELF} writes the samples of one stage, and a sweep measures on others: {once}."
            )
        self.calibrate().check()
        for setting in settings_of(self):
            self.prune_options(setting, Path("calibration"), Path("model")).check()

    def calibrate(self) -> CalibrateOptions:
        """How the samples are drawn."""
        names = ("dataset", "nsamples", "seqlen", "tokens", "batch_size", "only", "skip")
        drawn = {name: getattr(self, name) for name in names}
        return CalibrateOptions(**self.run(), **drawn).under(self.numerics)

    def prune_options(self, setting: Setting, calibration: Path | None, model: Path) -> PruneOptions:
        """The prune of one setting. model: the directory for a method that changes the kept weights."""
        shared = {name: getattr(self, name) for name in ("sparsity", "only", "skip", "batch_size", "resume")}
        shared |= self.run() | {"save_model": model if setting.recipe.changes_weights else None}
        return PruneOptions(**shared, recipe=setting.recipe, allocate=setting.allocate, calibration=calibration)


@dataclass(frozen=True)
class Setting:
    """One point of the grid. values: what distinguishes it, by the names of the options, without dashes."""

    values: Mapping[str, Any]
    recipe: Recipe
    allocate: AllocateOptions | None

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that its allocation reads."""
        return self.allocate.allocating.needs if self.allocate else frozenset()


def settings_of(options: SweepOptions) -> list[Setting]:
    """The points of the grid in order, each once; a choice's settings multiply only where it is made."""
    found: dict[tuple[Any, ...], Setting] = {}
    for method, alloc, trim in product(options.method, options.alloc, options.trim):
        recipe = Recipe(method=method, rows="trim" if trim else "even", input_recalc=options.input_recalc and trim)
        recipe = replace(recipe, numerics=options.numerics, propagate=options.propagate)
        allocation = ALLOCATIONS[alloc]
        for chosen in _combinations(options, [allocation, *recipe.entries]):
            own = tuple(one for one in chosen if type(one) is allocation.options)
            allocate = None
            if alloc != "uniform":
                shared = {**options.run(), "sparsity": options.sparsity, "numerics": options.numerics}
                shared |= {"only": options.only, "skip": options.skip}
                cache = options.metrics_cache if allocation.remembers else None
                allocate = AllocateOptions(**shared, method=alloc, metrics_cache=cache, options=own)
            values = {"method": method, "alloc": alloc, "trim": trim}
            for kind in chosen:
                given = {one.field: getattr(kind, one.field) for one in declared(type(kind))}
                values |= {name.rstrip("_"): value for name, value in given.items() if value not in (None, False)}
            pruning = replace(recipe, options=tuple(one for one in chosen if one not in own))
            found.setdefault(tuple(values.items()), Setting(values, pruning, allocate))
    return list(found.values())


def _combinations(options: SweepOptions, entries: Iterable[Entry]) -> list[tuple[Any, ...]]:
    """Instances of the entries' option classes, in every combination of the values that the grid gives."""
    made = []
    for kind in option_types(*entries):
        names = [one.field for one in declared(kind) if one.field in options.settings]
        grid = product(*(options.settings[name] for name in names))
        made.append([kind(**dict(zip(names, chosen, strict=True))) for chosen in grid])
    return list(product(*made))
