"""The prune stage: the pipeline that composes statistics, scores, rows, masks and updates, written once."""

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trimcli.commands.allocate import METHODS, AllocateOptions
from trimcli.commands.calibrate import CalibrateOptions
from trimcli.commands.resolve import cached_calibration, cached_ratios, with_stats
from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import OptionError
from trimcli.files.atomic import refuse_existing
from trimcli.files.cache import Cache
from trimcli.files.calibration import CalibrationFile
from trimcli.files.directory import PrunedLinear, commands_so_far, masked, write_model
from trimcli.files.documents import read_json
from trimcli.files.manifest import MASKS, PRUNED, manifest
from trimcli.files.masks import write_masks
from trimcli.files.parts import Part, Parts
from trimcli.files.ratios import LayerSparsity
from trimcli.files.rowstats import stats_paths, write_row_stats
from trimcli.files.tensors import dtype_name
from trimcli.memory import PeakMemory
from trimcli.methods import masks
from trimcli.methods.recipe import Recipe, Target, uniform_target
from trimcli.methods.scores import Statistic
from trimcli.model.skeleton import Skeleton, open_model
from trimcli.options import RunOptions, check_positive, one_of
from trimcli.pipeline.passes import Passes
from trimcli.pipeline.plan import Plan, chosen_linears, make_plan, walks
from trimcli.pipeline.walk import default_seqlen

Announce = Callable[[Plan], None]


@dataclass(frozen=True, kw_only=True)
class PruneOptions(RunOptions):
    """What to prune, and how.

    recipe: the method. sparsity, sparsity_type, ratios: the target, one of them. calibration: a calibration
    file; without one `calibrate` says how to make it, through the stage cache. allocate: layer allocation in one go.
    only, skip: globs over full module names. save_model: write the pruned directory too. stats_out: what TRIM
    found, as JSON and safetensors. gram_dtype: accumulation of SparseGPT's Gram. resume: go on where an
    interrupted run of the same command stopped.
    """

    recipe: Recipe = field(default_factory=Recipe)
    sparsity: float | None = None
    sparsity_type: str = "unstructured"
    ratios: Path | None = None
    calibration: Path | None = None
    calibrate: CalibrateOptions | None = None
    allocate: AllocateOptions | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    save_model: Path | None = None
    stats_out: Path | None = None
    gram_dtype: str = "float32"
    batch_size: int | None = None
    resume: bool = True

    def check(self) -> None:
        """Raise OptionError for values and combinations that cannot be used, before anything is read."""
        pattern = masks.parse_pattern(self.sparsity_type)
        self.recipe.check(pattern=pattern is not None)
        check_positive("--batch-size", self.batch_size)
        refused = [
            (
                self.ratios and self.sparsity is not None,
                "--ratios with --sparsity: the ratios file holds the target",
            ),
            (
                self.ratios and pattern,
                f"--ratios with --sparsity-type {self.sparsity_type}: each says what goes",
            ),
            (self.ratios and self.allocate, "--ratios with --alloc: the ratios file is an allocation"),
            (
                pattern and self.allocate,
                f"--alloc with --sparsity-type {self.sparsity_type}: each says what goes",
            ),
            (
                self.calibration and self.calibrate,
                "--calibration with --dataset, --tokens, --nsamples or --seqlen",
            ),
            (
                self.stats_out and not self.recipe.rows,
                "--stats-out without --use-trim: it holds what TRIM found",
            ),
            (
                self.recipe.changes_weights and not self.save_model,
                f"--method {self.recipe.method} without --save-model: it changes the kept weights, so masks alone do "
                "not carry its result; give --save-model DIR",
            ),
        ]
        for wrong, what in refused:
            if wrong:
                raise OptionError(f"these options do not go together: {what}.")
        if self.allocate:
            self._check_allocation(self.allocate)
        elif not self.ratios:
            uniform_target(self.sparsity, self.sparsity_type)
        one_of("--gram-dtype", self.gram_dtype, ("float32", "float64"))

    def _check_allocation(self, allocate: AllocateOptions) -> None:
        one_of("--alloc", allocate.method, METHODS)
        if allocate.method == "owl" and allocate.calibration is None and allocate.import_file is None:
            # The run itself makes it.
            allocate = replace(allocate, calibration=Path("calibration"))
        allocate.check()


@dataclass(frozen=True)
class PruneSummary:
    """What prune did. layers: decoder layer's name -> sparsity of its pruned linears. resumed: layers taken over."""

    masks: Path
    sparsity: float
    zeros: int
    weights: int
    linears: int
    layers: dict[str, float]
    model_directory: Path | None
    rows_improved: int | None
    remarks: tuple[str, ...]
    resumed: int
    seconds: float
    peak_memory: dict[str, int]


def prune(
    model: str,
    output: Path,
    options: PruneOptions,
    *,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
    announce: Announce | None = None,
) -> PruneSummary:
    """Choose the masks of a model, one decoder layer resident, and write them (and, on request, the pruned model).

    model: a directory or hub id. output: the masks file. announce: is given the plan before any pass. Raises
    UsageError for what cannot be used, ResourceError when memory or disk run out.
    """
    options.check()
    _refuse_outputs(output, options, force=force)
    started = time.monotonic()
    with PeakMemory() as memory:
        run = _Run(open_model(model, options), options, progress)
        plan = run.plan()
        if announce:
            announce(plan)
        with Cache(options.cache_dir).parts(run.key("first")) as first:
            if not options.resume:
                first.discard()
            resumed = run.passes.first(first)
            if options.recipe.barber:
                with Cache(options.cache_dir).parts(run.key("second")) as second:
                    if not options.resume:
                        second.discard()
                    resumed += run.passes.second(first, second)
                    results = run.write(second, output, force=force, rows=first)
                    second.discard()
            else:
                results = run.write(first, output, force=force, rows=first)
            first.discard()
    return replace(results, resumed=resumed, seconds=time.monotonic() - started, peak_memory=memory.document())


def _refuse_outputs(output: Path, options: PruneOptions, *, force: bool) -> None:
    """Raise UsageError for an output that exists already, or that two of them would be written to."""
    outputs = [output, *([options.save_model] if options.save_model else [])]
    outputs += stats_paths(options.stats_out) if options.stats_out else []
    places: set[Path] = set()
    for target in outputs:
        if target.resolve() in places:
            raise OptionError(f"the run would write two outputs to {target}; name another file in -o or --stats-out.")
        places.add(target.resolve())
        refuse_existing(target, force=force)


class _Run:
    """One prune: the skeleton, what is to go, and the passes."""

    def __init__(self, skeleton: Skeleton, options: PruneOptions, progress: Progress) -> None:
        self.skeleton, self.options, self.progress = skeleton, options, progress
        self.recipe = options.recipe
        self.linears = chosen_linears(skeleton, options.only, options.skip, progress)
        self.ratios: Path | None = options.ratios
        self.calibration: CalibrationFile | None = None
        if options.calibration:
            self.calibration = CalibrationFile(options.calibration)
            self.calibration.check(skeleton.fingerprint)
        self.allocation: LayerSparsity | None = None
        self.targets = self._targets()
        if self.calibration is None and (self.recipe.needs or self.recipe.barber):
            self.calibration = self._calibrated()
        if self.calibration and not walks(self.recipe):
            self.calibration.require(self.recipe.needs)
        self.passes = Passes(
            skeleton,
            self.recipe,
            self.targets,
            self.calibration,
            progress,
            gram_dtype=options.gram_dtype,
            batch_size=options.batch_size,
        )

    # --- what is asked for -------------------------------------------------------------------------------

    def _targets(self) -> dict[str, Target]:
        if self.options.allocate:
            allocate = self.options.allocate
            if allocate.method == "owl" and allocate.calibration is None and allocate.import_file is None:
                # The dense model's norms; a file with them serves the propagating prune as well.
                path = self.options.calibration or self._calibration_path("norms")
                allocate = replace(allocate, calibration=path)
            self.ratios = cached_ratios(self.skeleton, allocate, self.options.cache_dir, self.progress)
        if self.ratios is None:
            target = uniform_target(self.options.sparsity, self.options.sparsity_type)
            return {linear.name: target for linear in self.linears}
        ratios = self.allocation = LayerSparsity.load(self.ratios)
        ratios.check(self.skeleton.shapes, self.skeleton.fingerprint)
        pattern = ratios.pattern or {}
        targets = {
            name: Target(ratios.sparsity[name], pattern.get(name)) for name in (linear.name for linear in self.linears)
        }
        if pattern:
            self.recipe.check(pattern=True)
        return targets

    def _calibration_path(self, *stats: str) -> Path:
        options = self.options.calibrate or CalibrateOptions(
            **{name: getattr(self.options, name) for name in RunOptions.__dataclass_fields__}
        )
        if not walks(self.recipe):
            stats = tuple(dict.fromkeys((*stats, *self._stats())))
        return cached_calibration(self.skeleton, with_stats(options, *stats), self.progress)

    def _stats(self) -> tuple[str, ...]:
        named = (("norms", Statistic.SQNORM), ("inputs", Statistic.INPUTS))
        return tuple(name for name, statistic in named if statistic in self.recipe.needs)

    def _calibrated(self) -> CalibrationFile:
        allocate = self.options.allocate
        owl = allocate is not None and allocate.method == "owl" and not allocate.import_file
        return CalibrationFile(self._calibration_path(*(("norms",) if owl else ())))

    def plan(self) -> Plan:
        """The plan, which also refuses patterns that do not fit."""
        tokens = self.calibration.tokens.shape if self.calibration else (0, 0)
        return make_plan(
            self.skeleton,
            self.linears,
            self.targets,
            self.recipe,
            nsamples=tokens[0],
            seqlen=tokens[1] or default_seqlen(self.skeleton.config),
            saves_model=self.options.save_model is not None,
        )

    def key(self, stage: str) -> dict[str, Any]:
        """What the part files of a pass depend on."""
        recipe = self.recipe.document()
        if stage == "first":
            recipe.pop("barber")
        return {
            "stage": f"prune-{stage}",
            "model": self.skeleton.fingerprint.document(),
            "recipe": recipe,
            "targets": {name: list(target) for name, target in sorted(self.targets.items())},
            "calibration": self.calibration.digest() if self.calibration else None,
            "dtype": str(self.skeleton.dtype),
            "device": self.skeleton.device.type,
            "gram": self.options.gram_dtype,
        }

    # --- the results -------------------------------------------------------------------------------------

    def write(self, parts: Parts, output: Path, *, force: bool, rows: Parts) -> PruneSummary:
        """The masks file, and on request the model directory and TRIM's findings, from the part files."""
        found = self._parts(parts)
        homes = {
            linear.name: part
            for layer, part in zip(self.skeleton.layers, found, strict=True)
            for linear in self.passes.mine(layer)
        }
        remarks = tuple(remark for part in found for remark in part.facts["remarks"])
        options = self.options
        sources = {"calibration": self.calibration.path if self.calibration else None, "ratios": self.ratios}
        document = manifest(
            MASKS,
            "prune",
            {**options.document(), "recipe": self.recipe.document()},
            self.skeleton.fingerprint,
            {role: path for role, path in sources.items() if path},
            linears={
                name: {"target": target.sparsity, "pattern": list(target.pattern) if target.pattern else None}
                for name, target in self.targets.items()
            },
            changes_weights=self.recipe.changes_weights,
            commands=commands_so_far(*self._made_before()),
            numerics=self.recipe.numerics,
            remarks=list(remarks),
            allocation={"method": self.allocation.method, **self.allocation.parameters} if self.allocation else None,
            compute_dtype=dtype_name(self.skeleton.dtype),
        )

        def keep(name: str) -> Tensor:
            return masks.unpack(homes[name].load(f"{name}.keep"), self.skeleton.linears[name].d_in)

        shapes = {linear.name: linear.shape for linear in self.linears}
        facts = {name: fact for part in self._parts(rows) for name, fact in part.facts["rows"].items()}
        improved = sum(fact["step"] != 0 for fact in facts.values()) if self.recipe.rows else None
        with contextlib.ExitStack() as undo:
            # All outputs or none: the part files stay, so that the same command writes them when it is repeated.
            complete = write_masks(output, document, shapes, keep, force=force)
            undo.callback(output.unlink)
            if options.save_model:
                self._write_model(options.save_model, complete, homes, keep, force=force)
                undo.callback(shutil.rmtree, options.save_model)
            if options.stats_out:
                write_row_stats(options.stats_out, complete, facts, rows, len(self.skeleton.layers), force=force)
            undo.pop_all()
        return self._summary(output, complete, remarks, improved)

    def _parts(self, parts: Parts) -> list[Part]:
        return [parts.read(layer.index) for layer in self.skeleton.layers]

    def _made_before(self) -> list[Mapping[str, Any]]:
        """The manifests of the stages before this one."""
        before: list[Mapping[str, Any]] = [read_json(self.ratios)] if self.ratios else []
        return [self.calibration.manifest, *before] if self.calibration else before

    def _write_model(
        self,
        target: Path,
        document: Mapping[str, Any],
        homes: Mapping[str, Part],
        keep: Callable[[str], Tensor],
        *,
        force: bool,
    ) -> None:
        by_key = {linear.key: linear for linear in self.linears}

        def weight_of(key: str) -> Tensor | None:
            linear = by_key.get(key)
            if linear is None:
                return None
            part = homes[linear.name]
            dense = self.skeleton.checkpoint.load(key)
            if f"{linear.name}.weight" in part.names:
                return linear.replaced(dense, part.load(f"{linear.name}.weight"))
            return linear.replaced(dense, masked(linear.within(dense), keep(linear.name)))

        linears = {}
        for linear in self.linears:
            entry = document["linears"][linear.name]
            pattern = self.targets[linear.name].pattern
            assert linear.key is not None
            linears[linear.name] = PrunedLinear(
                linear.key, linear.shape, linear.transposed, entry["zeros"], entry["target"], pattern
            )
        described = manifest(
            PRUNED,
            "prune",
            document["options"],
            self.skeleton.fingerprint,
            pruning={key: value for key, value in document.items() if key != "linears"},
            commands=commands_so_far(document),
        )
        checkpoint = self.skeleton.checkpoint
        write_model(checkpoint, target, weight_of, described, linears, force=force, progress=self.progress)

    def _summary(
        self, output: Path, document: Mapping[str, Any], remarks: tuple[str, ...], improved: int | None
    ) -> PruneSummary:
        zeros = {name: entry["zeros"] for name, entry in document["linears"].items()}
        layers = {}
        for layer in self.skeleton.layers:
            mine = self.passes.mine(layer)
            if mine:
                layers[layer.name] = sum(zeros[one.name] for one in mine) / sum(one.numel for one in mine)
        return PruneSummary(
            masks=output,
            sparsity=document["sparsity"],
            zeros=sum(zeros.values()),
            weights=sum(linear.numel for linear in self.linears),
            linears=len(self.linears),
            layers=layers,
            model_directory=self.options.save_model,
            rows_improved=improved,
            remarks=remarks,
            resumed=0,
            seconds=0.0,
            peak_memory={},
        )
