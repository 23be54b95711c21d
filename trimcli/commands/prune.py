"""The prune stage: the pipeline that composes statistics, scores, rows, masks and updates, written once."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trimcli.commands.apply import masked_weights, pruned_linear
from trimcli.commands.options import AllocateOptions, CalibrateOptions, PruneOptions
from trimcli.commands.plan import foreseen
from trimcli.commands.resolve import (
    cached_calibration,
    cached_ratios,
    matrices_of,
    refuse_samples_of_other_kind,
    targets_of,
)
from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import OptionError
from trimcli.files.atomic import MARK, all_or_none, file_digest
from trimcli.files.cache import Cache, spill_folder
from trimcli.files.calibration import CalibrationFile
from trimcli.files.directory import PrunedTensors, commands_so_far, write_model
from trimcli.files.documents import read_json, read_mark
from trimcli.files.forms import COUNT, Each, Must, check_form
from trimcli.files.manifest import MASKS, PRUNED, manifest
from trimcli.files.masks import write_masks
from trimcli.files.outputs import check_outputs, check_space, inputs_of
from trimcli.files.parts import Part, Parts
from trimcli.files.ratios import LayerSparsity
from trimcli.files.rowstats import stats_paths, write_row_stats
from trimcli.files.tensors import dtype_name
from trimcli.memory import PeakMemory
from trimcli.methods import masks
from trimcli.methods.recipe import Recipe
from trimcli.methods.stats import stored_statistics
from trimcli.methods.updates.grid import Grid
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton, open_model
from trimcli.pipeline.estimate import walks
from trimcli.pipeline.passes import Passes
from trimcli.pipeline.plan import Plan, make_plan
from trimcli.pipeline.proof import prove
from trimcli.pipeline.selection import globs_outside
from trimcli.pipeline.walk import sample_length, usual_length
from trimcli.world import joined, ranks

Announce = Callable[[Plan], None]
KeepOf = Callable[[str], Tensor]


@dataclass(frozen=True)
class PruneSummary:
    """What prune did. layers: sparsity by layer, in the decoder or outside. resumed: those an earlier run had finished.

    heldout: by step, in how many matrices held-out samples let it stand, of how many. layers_bettered: by step of whole
    layers, how many it brought nearer to the dense ones there. planned: how it kept to memory.
    """

    masks: Path
    sparsity: float
    zeros: int
    weights: int
    linears: int
    layers: dict[str, float]
    model_directory: Path | None
    rows_improved: int | None
    heldout: dict[str, tuple[int, int]]
    layers_bettered: dict[str, tuple[int, int]]
    remarks: tuple[str, ...]
    resumed: int
    seconds: float
    peak_memory: dict[str, int]
    planned: dict[str, Any]


def prune(
    model: str,
    output: Path,
    options: PruneOptions,
    *,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
    announce: Announce | None = None,
) -> PruneSummary:
    """Choose a model's masks, one decoder layer resident, and write them; `announce` is given the plan. TrimError."""
    options.check()
    _refuse_ranks(options.recipe)
    _refuse_outputs(model, output, options, force=force)
    started = time.monotonic()
    with joined() as world:
        with PeakMemory() as memory, contextlib.ExitStack() as stack:
            skeleton = open_model(model, options, images=None)
            refuse_samples_of_other_kind(skeleton, options)
            linears = matrices_of(skeleton, options, progress)
            if any(options.limits):
                foreseen(skeleton, linears, options)  # what would not fit is said before a calibration is made
            run = _Run(skeleton, linears, options, progress)
            plan = run.plan()
            if announce:
                announce(plan)
            saved = {options.save_model: plan.model_bytes or 0} if options.save_model else {}
            check_space({output: plan.mask_bytes, **saved})
            if walks(run.recipe) or run.recipe.barber:
                prove(run.skeleton, options.cache_dir, progress)
            plan.fit.hold(run.skeleton)
            stages = ["first", "second"] if options.recipe.barber else ["first"]
            passes = [stack.enter_context(Cache(options.cache_dir).parts(run.key(stage))) for stage in stages]
            for parts in [] if options.resume else passes:
                parts.discard()
            resumed = run.passes.first(passes[0])
            if options.recipe.barber:
                resumed += run.passes.second(*passes)
            document, improved = world.agreed(lambda: run.write(passes[-1], output, force=force, rows=passes[0]))
            for parts in passes:
                parts.discard()
        peak = world.most(memory.document())
    found, layers = document["linears"], {}
    for layer in run.passes.layers:
        if mine := run.passes.mine(layer):
            layers[layer.name] = sum(found[one.name]["zeros"] for one in mine) / sum(one.numel for one in mine)
    return PruneSummary(
        masks=output,
        sparsity=document["sparsity"],
        zeros=sum(entry["zeros"] for entry in found.values()),
        weights=sum(linear.numel for linear in run.linears),
        linears=len(found),
        layers=layers,
        model_directory=options.save_model,
        rows_improved=improved,
        heldout=_stood(document["heldout"].values()),
        layers_bettered=_bettered(document),
        remarks=tuple(document["remarks"]),
        resumed=resumed,
        seconds=time.monotonic() - started,
        peak_memory=peak,
        planned=plan.memory_document(),
    )


def _stood(judged: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[int, int]]:
    """By step, how many were no worse after it than before, and of how many."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for steps in judged:
        for step, pair in steps.items():
            errors.setdefault(step, []).append(pair)
    return {step: (sum(after <= before for before, after in pairs), len(pairs)) for step, pairs in errors.items()}


def _bettered(document: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """By step of whole layers, how many it left with a smaller error on held-out samples, and of how many."""
    found = {}
    for title, key in (("learning masks", "refinement"), ("reconstruction", "reconstruction")):
        if pairs := [pair for pair in document[key].values() if pair is not None]:
            found[title] = sum(after < before for before, after in pairs), len(pairs)
    return found


def _refuse_ranks(recipe: Recipe) -> None:
    """Raise OptionError for what several ranks cannot share: steps of training, each of which needs the one before."""
    if recipe.follows_dense and ranks() > 1:
        flag = f"--reconstruct {recipe.reconstruct}" if recipe.reconstructs else f"--refine {recipe.refine}"
        raise OptionError(f"{flag} trains in one process and {ranks()} ranks were started; leave it out, or torchrun.")


def _refuse_outputs(model: str, output: Path, options: PruneOptions, *, force: bool) -> None:
    """Raise UsageError for an output that cannot be written, that loses an input or that meets another."""
    stats = stats_paths(options.stats_out) if options.stats_out else []
    kept = [options.allocate.metrics_cache] if options.allocate else []
    inputs, directories = inputs_of(options, model), [options.save_model]
    check_outputs(inputs, files=[output, *stats], directories=directories, kept=kept, force=force)


class _Run:
    """One prune: the skeleton, what is to go, and the passes."""

    def __init__(self, skeleton: Skeleton, linears: list[Matrix], options: PruneOptions, progress: Progress) -> None:
        self.skeleton, self.linears, self.options, self.progress = skeleton, linears, options, progress
        self.recipe = options.recipe
        self.ratios, self.calibration = options.ratios, None
        if options.calibration:
            self.calibration = CalibrationFile(options.calibration)
            self.calibration.check(skeleton.fingerprint)
        if options.allocate:
            self.ratios = cached_ratios(skeleton, self._allocation(options.allocate), options.cache_dir, progress)
        self.allocation = LayerSparsity.load(self.ratios) if self.ratios else None
        self.targets = targets_of(skeleton, self.linears, options, self.allocation)
        if self.calibration is None and (self.recipe.needs or self.recipe.barber or self.recipe.follows_dense):
            self.calibration = CalibrationFile(self._calibrated())
        if self.calibration and not walks(self.recipe):
            self.calibration.require(self.recipe.needs)
        self.keep_zeros = self._keeps_zeros()
        what = self.targets, self.calibration, progress, options.batch_size, self.keep_zeros
        self.passes = Passes(skeleton, self.recipe, *what)

    def _keeps_zeros(self) -> bool:
        """Whether weights that are zero already stay so; warns where an earlier prune's may not."""
        directory = self.skeleton.checkpoint.directory
        mark = read_mark(directory)
        check_form(mark, {"linears": Each(Must({"zeros": Must(COUNT)}))}, directory / MARK, "manifest")
        earlier = mark.get("linears") or {}
        chosen = bool(earlier) if self.options.keep_zeros is None else self.options.keep_zeros
        if earlier and self.recipe.updating.changes and not chosen:
            zeros = sum(entry["zeros"] for entry in earlier.values())
            what = f"{zeros:,} weights of {self.skeleton.checkpoint.id} are zero already, and some may return"
            self.progress.warn(f"{what}; --keep-zeros holds them.")
        return chosen

    def _allocation(self, allocate: AllocateOptions) -> AllocateOptions:
        """The allocation over the layers with the calibration that it reads, given or made."""
        allocate = replace(allocate, only=self._inside(allocate.only))
        if not allocate.allocating.needs or allocate.import_file or allocate.calibration:
            return allocate
        return replace(allocate, calibration=self.options.calibration or self._calibrated())

    def _calibrated(self) -> Path:
        """The calibration file in the stage cache, with the statistics that anything will read from a file."""
        allocate = self.options.allocate
        needs = frozenset[str]() if walks(self.recipe) else self.recipe.needs
        if allocate is not None and not allocate.import_file:
            needs |= allocate.allocating.needs
        stats = tuple(option for option, one in stored_statistics().items() if one.name in needs)
        drawn = self.options.calibrate or CalibrateOptions(**self.options.run())
        only, skip = self._inside(self.options.only), self.options.skip
        options = replace(drawn.under(self.recipe.numerics), stats=stats, only=only, skip=skip)
        return cached_calibration(self.skeleton, options, self.progress)

    def _inside(self, only: tuple[str, ...]) -> tuple[str, ...]:
        """The globs of --only that are meant for linears of the layers."""
        beyond = globs_outside(self.skeleton, only)
        return tuple(glob for glob in only if glob not in beyond)

    def plan(self) -> Plan:
        """The plan, which also refuses patterns that do not fit."""
        shape = self.calibration.shape if self.calibration else None
        nsamples, seqlen = (shape[0], sample_length(self.skeleton, shape)) if shape else (0, 0)
        return make_plan(
            self.skeleton,
            self.linears,
            self.targets,
            self.recipe,
            nsamples=nsamples,
            seqlen=seqlen or usual_length(self.skeleton),
            saves_model=self.options.save_model is not None,
            calibrates=self.options.calibrates,
            trials=self.options.allocate.trials if self.options.allocate else None,
            batch_size=self.options.batch_size,
            spill=self.options.spill,
            otherwise=spill_folder(self.options.cache_dir),
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
            "calibration": file_digest(self.calibration.path) if self.calibration else None,
            "dtype": str(self.skeleton.dtype),
            "device": self.skeleton.device.type,
            "keep_zeros": self.keep_zeros,
        }

    def write(self, parts: Parts, output: Path, *, force: bool, rows: Parts) -> tuple[dict[str, Any], int | None]:
        """All outputs, from the part files; returns the masks' manifest and how many linears TRIM bettered."""
        layers = [(layer, parts.read(layer.index)) for layer in self.passes.layers]
        homes = {linear.name: part for layer, part in layers for linear in self.passes.mine(layer)}
        options, obs = self.options, self.recipe.obs
        first = [rows.read(layer.index).facts for layer, _ in layers]
        reached = {name: {"tokens": count} for found in first for name, count in found.get("tokens", {}).items()}
        # What comes from the stage cache names the command that filled it, which may be of another run.
        before = [self.calibration.manifest] if self.calibration and options.calibration else []
        before += [read_json(options.ratios)] if options.ratios else []
        rebuilt = self.recipe.barber and not self.recipe.barber.retain_reconstruction
        document = manifest(
            MASKS,
            "prune",
            {**options.document(), "recipe": self.recipe.document(), "keep_zeros": self.keep_zeros},
            self.skeleton.fingerprint,
            {"calibration": self.calibration.path if self.calibration else None, "ratios": self.ratios},
            linears={
                name: {"target": one.sparsity, "pattern": one.pattern, **reached.get(name, {})}
                for name, one in self.targets.items()
            },
            changes_weights=self.recipe.changes_weights,
            commands=commands_so_far(*before),
            numerics=self.recipe.numerics,
            remarks=[remark for _, part in layers for remark in part.facts["remarks"]],
            allocation={"method": self.allocation.method, **self.allocation.parameters} if self.allocation else None,
            refinement={layer.name: part.facts.get("learned") for layer, part in layers},
            reconstruction={layer.name: part.facts.get("errors") for layer, part in layers},
            heldout={name: entry for found in first for name, entry in found["judged"].items() if not rebuilt},
            compute_dtype=dtype_name(self.skeleton.dtype),
            bos=self.calibration.manifest.get("bos") if self.calibration else None,
        )

        shapes = {linear.name: linear.shape for linear in self.linears}

        def keep(name: str) -> Tensor:
            return masks.unpack(homes[name].load(f"{name}.keep"), shapes[name][1])

        def grid(name: str) -> Grid | None:
            rounded = obs.wbits if f"{name}.scales" in homes[name].names else None
            found = (homes[name].load(f"{name}.{kind}") for kind in ("scales", "zeros"))
            return Grid(rounded, obs.group_size, *found) if rounded else None

        facts = {name: row for found in first for name, row in found["rows"].items()}
        improved = sum(fact["step"] != 0 for fact in facts.values()) if self.recipe.allocating.searches else None
        with all_or_none():  # where it fails, the same command writes them from the part files, which stay
            complete = write_masks(output, document, shapes, keep, grid, force=force)
            if options.save_model:
                fitted = {
                    f"{layer.name}.{name}": part for layer, part in layers for name in part.facts.get("fitted", ())
                }
                self._write_model(options.save_model, complete, {**homes, **fitted}, keep, force=force)
            if options.stats_out:
                write_row_stats(options.stats_out, complete, facts, rows, len(layers), force=force)
        return complete, improved

    def _write_model(
        self, target: Path, document: Mapping[str, Any], homes: Mapping[str, Part], keep: KeepOf, *, force: bool
    ) -> None:
        checkpoint = self.skeleton.checkpoint
        linears = {linear.name: pruned_linear(linear, document["linears"][linear.name]) for linear in self.linears}
        masked = masked_weights(checkpoint, self.linears, keep, lambda name: homes[name].weight(name))
        fitted = {self.skeleton.key_of(name): name for name in homes if name not in linears}

        def weights(key: str) -> Tensor | None:
            return homes[fitted[key]].load(fitted[key]) if key in fitted else masked(key)

        tensors = PrunedTensors(checkpoint, weights, linears, keep)
        described = manifest(
            PRUNED,
            "prune",
            document["options"],
            self.skeleton.fingerprint,
            pruning={key: value for key, value in document.items() if key != "linears"},
            commands=commands_so_far(document),
        )
        write_model(tensors, target, described, force=force, progress=self.progress)
