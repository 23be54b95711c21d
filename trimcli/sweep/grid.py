"""The grid of a sweep: its options, its points, and the `trim prune` command line of a point."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

from trimcli.commands.allocate import METHODS, AllocateOptions
from trimcli.commands.calibrate import CalibrateOptions
from trimcli.commands.prune import PruneOptions
from trimcli.errors import OptionError
from trimcli.methods.masks import Numerics
from trimcli.methods.recipe import Method, Recipe
from trimcli.methods.rows.search import RowOptions
from trimcli.options import RunOptions, check_positive, check_sparsity, one_of

# Which settings a choice brings with it: name in this module -> option of `trim prune`.
OWL = {"lambda_": "--lambda", "hyper_m": "--hyper-m"}
ALPHA = {"ww_metric": "--ww-metric", "epsilon": "--epsilon", "mapping_type": "--mapping-type"}
TRIM = {"qmetric": "--qmetric", "qmetric_dimwise": "--qmetric-dimwise", "iterations": "--iterations"}
OF_ALLOC = {"uniform": {}, "owl": OWL, "alpha": ALPHA}


@dataclass(frozen=True, kw_only=True)
class SweepOptions(RunOptions):
    """A grid, and what all of it has in common.

    sparsity: the target. method, alloc (uniform, owl, alpha), trim (with TRIM's rows, without): the choices.
    lambda_, hyper_m: OWL's values; ww_metric, epsilon, mapping_type: Alpha's; qmetric, qmetric_dimwise,
    iterations: TRIM's; None for the one default. dataset, nsamples, seqlen, tokens: the samples, as for
    calibrate. holdout: samples that measure; of `tokens` the last ones. metrics_cache: Alpha's. The rest as
    for prune. resume: take over what an earlier sweep measured.
    """

    sparsity: float
    method: tuple[str, ...] = ("wanda",)
    alloc: tuple[str, ...] = METHODS
    trim: tuple[bool, ...] = (False, True)
    lambda_: tuple[float, ...] | None = None
    hyper_m: tuple[float, ...] | None = None
    ww_metric: tuple[str, ...] | None = None
    epsilon: tuple[float, ...] | None = None
    mapping_type: tuple[str, ...] | None = None
    qmetric: tuple[str, ...] | None = None
    qmetric_dimwise: tuple[str, ...] | None = None
    iterations: tuple[int, ...] | None = None
    forbid_negative: bool = False
    input_recalc: bool = False
    propagate: bool = True
    numerics: Numerics = "exact"
    dataset: str = "c4"
    nsamples: int = 256
    seqlen: int | None = None
    tokens: Path | None = None
    holdout: int = 32
    metrics_cache: Path | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    batch_size: int | None = None
    resume: bool = True

    def check(self) -> None:
        """Raise OptionError for values and combinations that cannot be used, before anything is read."""
        check_sparsity(self.sparsity)
        check_positive("--holdout", self.holdout)
        for name in self.alloc:
            one_of("--alloc", name, METHODS)
        for axis, chosen in (("--method", self.method), ("--alloc", self.alloc), ("--trim", self.trim)):
            if not chosen:
                raise OptionError(f"{axis} names nothing to try; give at least one value.")
        for needed, there, settings in (
            ("--alloc owl", "owl" in self.alloc, OWL),
            ("--alloc alpha", "alpha" in self.alloc, ALPHA),
            ("--trim on", True in self.trim, TRIM),
        ):
            for name, flag in settings.items():
                if not there and getattr(self, name) is not None:
                    raise OptionError(f"{flag} does nothing without {needed}; add it or leave {flag} out.")
        if self.input_recalc and True not in self.trim:
            raise OptionError("--input-recalc does nothing without --trim on; add it or leave it out.")
        self.calibrate().check()
        for setting in settings_of(self):
            self.prune_options(setting, Path("calibration"), Path("model")).check()
            if setting.allocate is not None:
                replace(setting.allocate, calibration=Path("calibration") if setting.owl else None).check()

    def run(self) -> dict[str, Any]:
        """What every stage takes from the run, by name."""
        return {name: getattr(self, name) for name in RunOptions.__dataclass_fields__}

    def calibrate(self) -> CalibrateOptions:
        """How the samples are drawn."""
        drawn = {name: getattr(self, name) for name in ("dataset", "nsamples", "seqlen", "tokens", "batch_size")}
        return CalibrateOptions(**self.run(), **drawn)

    def prune_options(self, setting: "Setting", calibration: Path, model: Path) -> PruneOptions:
        """The prune of one setting. model: the directory for a method that changes the kept weights."""
        return PruneOptions(
            **self.run(),
            recipe=setting.recipe,
            sparsity=self.sparsity,
            allocate=setting.allocate,
            calibration=calibration,
            only=self.only,
            skip=self.skip,
            batch_size=self.batch_size,
            save_model=model if setting.recipe.changes_weights else None,
            resume=self.resume,
        )


@dataclass(frozen=True)
class Setting:
    """One point of the grid. values: what distinguishes it, by the names of the options, without dashes."""

    values: Mapping[str, Any]
    recipe: Recipe
    allocate: AllocateOptions | None

    @property
    def owl(self) -> bool:
        """Whether its allocation reads the calibration's norms."""
        return self.allocate is not None and self.allocate.method == "owl"


def settings_of(options: SweepOptions) -> list[Setting]:
    """The points of the grid in order, each once; a choice's settings multiply only where it is made."""
    found: dict[tuple[Any, ...], Setting] = {}
    for method, alloc, own in _choices(options):
        for trim in options.trim:
            for rows in _combinations(options, TRIM) if trim else [{}]:
                setting = _setting(options, method, alloc, own, rows if trim else None)
                found.setdefault(tuple(setting.values.items()), setting)
    return list(found.values())


def _choices(options: SweepOptions) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for method, alloc in product(options.method, options.alloc):
        for own in _combinations(options, OF_ALLOC[alloc]):
            yield method, alloc, own


def _combinations(options: SweepOptions, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every combination of the values of `names`; where none were given, the default of the stage itself."""
    defaults = {**asdict(AllocateOptions()), **asdict(RowOptions())}
    values: list[tuple[Any, ...]] = [getattr(options, name) or (defaults[name],) for name in names]
    return [dict(zip(names, chosen, strict=True)) for chosen in product(*values)]


def _setting(
    options: SweepOptions, method: str, alloc: str, own: dict[str, Any], rows: dict[str, Any] | None
) -> Setting:
    allocate = None
    if alloc != "uniform":
        cache = options.metrics_cache if alloc == "alpha" else None
        allocate = AllocateOptions(
            **options.run(),
            method=alloc,
            sparsity=options.sparsity,
            metrics_cache=cache,
            numerics=options.numerics,
            **own,
        )
    search = None
    if rows is not None:
        search = RowOptions(**rows, forbid_negative=options.forbid_negative, numerics=options.numerics)
    recipe = Recipe(
        method=cast(Method, method),
        numerics=options.numerics,
        rows=search,
        propagate=options.propagate,
        input_recalc=options.input_recalc and search is not None,
    )
    plain = {name.rstrip("_"): value for name, value in {**own, **(rows or {})}.items()}
    return Setting({"method": method, "alloc": alloc, "trim": rows is not None, **plain}, recipe, allocate)


def prune_command(model: str, options: SweepOptions, setting: Setting, calibrate: CalibrateOptions) -> str:
    """The command line that prunes as the setting did. calibrate: where its samples come from."""
    words: list[Any] = ["trim", "prune", model, "-o", "masks.safetensors", "--sparsity", options.sparsity]
    words += ["--method", setting.recipe.method]
    if setting.recipe.changes_weights:
        words += ["--save-model", "pruned"]
    if setting.allocate is not None:
        words += ["--alloc", setting.allocate.method]
        for name, flag in OF_ALLOC[setting.allocate.method].items():
            words += [flag, getattr(setting.allocate, name)]
    if setting.recipe.rows is not None:
        words.append("--use-trim")
        for name, flag in TRIM.items():
            words += [flag, getattr(setting.recipe.rows, name)]
    for flag, wanted in (
        ("--forbid-neg-lr", setting.recipe.rows is not None and options.forbid_negative),
        ("--input-recalc", setting.recipe.input_recalc),
        ("--no-propagate", not options.propagate),
        ("--trust-remote-code", options.trust_remote_code),
    ):
        words += [flag] if wanted else []
    if calibrate.tokens is not None:
        words += ["--tokens", calibrate.tokens]
    else:
        words += ["--dataset", calibrate.dataset, "--nsamples", calibrate.nsamples]
        words += ["--seqlen", calibrate.seqlen] if calibrate.seqlen is not None else []
    defaults = SweepOptions(sparsity=options.sparsity)
    for name in ("numerics", "batch_size", "seed", "device", "dtype", "revision", "cache_dir"):
        value = getattr(options, name)
        if value != getattr(defaults, name):
            words += [f"--{name.replace('_', '-')}", value]
    for flag, globs in (("--only", options.only), ("--skip", options.skip)):
        for glob in globs:
            words += [flag, glob]
    return shlex.join(str(word) for word in words)
