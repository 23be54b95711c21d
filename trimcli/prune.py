"""The prune stage: the pipeline that composes statistics, scores, rows, masks and updates, written once."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimcli import masks
from trimcli.allocate import AllocateOptions
from trimcli.allocation import LayerSparsity
from trimcli.artifacts import MASKS, PRUNED, manifest, refuse_existing
from trimcli.cache import Cache, Part, Parts
from trimcli.calibrate import CalibrateOptions, open_model
from trimcli.calibration import CalibrationFile
from trimcli.console import NO_PROGRESS, Progress
from trimcli.directory import PrunedLinear, commands_so_far, write_model
from trimcli.errors import OptionError
from trimcli.maskfile import write_masks
from trimcli.memory import PeakMemory
from trimcli.model import DecoderLayer, Linear, Skeleton
from trimcli.options import RunOptions, check_positive
from trimcli.plan import Plan, chosen_linears, make_plan, walks
from trimcli.recipe import Outcome, Recipe, Target, uniform_target
from trimcli.rowstats import row_facts, row_tensors, stats_paths, write_row_stats
from trimcli.scores import LinearStats, Statistic
from trimcli.second_pass import rebuild_layer
from trimcli.stages import cached_calibration, cached_ratios, with_stats
from trimcli.statistics import Collector, InputGroup, refuse_unusable
from trimcli.walk import Walk, default_seqlen

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
            (self.ratios and self.sparsity is not None, "--ratios with --sparsity: the ratios file holds the target"),
            (self.ratios and pattern, f"--ratios with --sparsity-type {self.sparsity_type}: each says what goes"),
            (self.ratios and self.allocate, "--ratios with --alloc: the ratios file is an allocation"),
            (pattern and self.allocate, f"--alloc with --sparsity-type {self.sparsity_type}: each says what goes"),
            (self.calibration and self.calibrate, "--calibration with --dataset, --tokens, --nsamples or --seqlen"),
            (self.stats_out and not self.recipe.rows, "--stats-out without --use-trim: it holds what TRIM found"),
            (
                self.recipe.changes_weights and not self.save_model,
                f"--method {self.recipe.method} without --save-model: it changes the kept weights, so masks alone do "
                "not carry its result; give --save-model DIR",
            ),
        ]
        for wrong, what in refused:
            if wrong:
                raise OptionError(f"these options do not go together: {what}.")
        if not self.ratios and not self.allocate:
            uniform_target(self.sparsity, self.sparsity_type)
        if self.gram_dtype not in ("float32", "float64"):
            raise OptionError(f"--gram-dtype {self.gram_dtype!r} is none of float32, float64.")


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
    outputs = [output, *([options.save_model] if options.save_model else [])]
    outputs += stats_paths(options.stats_out) if options.stats_out else []
    for target in outputs:
        refuse_existing(target, force=force)
    started = time.monotonic()
    with PeakMemory() as memory:
        run = _Run(open_model(model, options), options, progress)
        plan = run.plan()
        if announce:
            announce(plan)
        with Cache(options.cache_dir).parts(run.key("first")) as first:
            if not options.resume:
                first.discard()
            resumed = run.first_pass(first)
            if options.recipe.barber:
                with Cache(options.cache_dir).parts(run.key("second")) as second:
                    if not options.resume:
                        second.discard()
                    resumed += run.second_pass(first, second)
                    results = run.write(second, output, force=force, rows=first)
                    second.discard()
            else:
                results = run.write(first, output, force=force, rows=first)
            first.discard()
    return replace(results, resumed=resumed, seconds=time.monotonic() - started, peak_memory=memory.document())


class _Run:
    """One prune: the skeleton, what is to go, and the passes."""

    def __init__(self, skeleton: Skeleton, options: PruneOptions, progress: Progress) -> None:
        self.skeleton, self.options, self.progress = skeleton, options, progress
        self.recipe = options.recipe
        self.linears = chosen_linears(skeleton, options.only, options.skip)
        self._chosen = {linear.name for linear in self.linears}
        self.ratios: Path | None = options.ratios
        self.calibration: CalibrationFile | None = None
        if options.calibration:
            self.calibration = CalibrationFile(options.calibration)
            self.calibration.check(skeleton.fingerprint)
        self.targets = self._targets()
        if self.calibration is None and (self.recipe.needs or self.recipe.barber):
            self.calibration = self._calibrated()
        if self.calibration and not walks(self.recipe):
            self.calibration.require(self.recipe.needs)

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
        ratios = LayerSparsity.load(self.ratios)
        ratios.check(self.skeleton)
        pattern = ratios.pattern or {}
        targets = {name: Target(ratios.sparsity[name], pattern.get(name)) for name in self._chosen}
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

    # --- the passes --------------------------------------------------------------------------------------

    def _walk(self) -> Walk:
        assert self.calibration is not None, "a recipe that walks has been given tokens"
        tokens = self.calibration.tokens
        return Walk(self.skeleton, tokens, batch_size=self.options.batch_size, progress=self.progress)

    def first_pass(self, parts: Parts) -> int:
        """Choose the masks layer by layer, leaving a part file each. Returns how many an earlier run had left."""
        done, total = parts.finished(), len(self.skeleton.layers)
        if done == total:
            return done
        with self.progress.task("pruning layers", total) as step:
            if not walks(self.recipe):
                for layer in self.skeleton.layers:
                    if layer.index >= done:
                        self._prune_from_file(layer, parts)
                    step()
                return done
            walk = self._walk()
            for layer in walk.layers():
                if layer.index < done:
                    self._replay(layer, parts.read(layer.index))
                else:
                    self._prune_layer(walk, layer, parts)
                if layer.index + 1 < total:
                    walk.advance(layer)
                step()
        return done

    def second_pass(self, first: Parts, second: Parts) -> int:
        """Rebuild the masks of `first` layer by layer into `second` (LLM-Barber)."""
        done, total = second.finished(), len(self.skeleton.layers)
        if done == total:
            return done
        walk = self._walk()
        with self.progress.task("rebuilding layers", total) as step:
            for layer in walk.layers():
                if layer.index < done:
                    self._replay(layer, second.read(layer.index))
                else:
                    self._rebuild(walk, layer, first.read(layer.index), second)
                if layer.index + 1 < total:
                    walk.advance(layer)
                step()
        return done

    def _mine(self, layer: DecoderLayer) -> list[Linear]:
        return [linear for linear in layer.linears if linear.name in self._chosen]

    def _prune_from_file(self, layer: DecoderLayer, parts: Parts) -> None:
        """Without propagation: statistics from the calibration file, one matrix in memory."""
        writer = _PartWriter(self)
        device = self.skeleton.device
        for linear in self._mine(layer):
            stats = LinearStats()
            if self.recipe.needs and self.calibration:
                found = self.calibration.statistics(linear.name)
                refuse_unusable(found, linear.name)
                stats = LinearStats(
                    sqnorm=None if found.sqnorm is None else found.sqnorm.to(device),
                    inputs=None if found.inputs is None else found.inputs.to(device),
                )
            weight = self.skeleton.read_weight(linear).to(device)
            writer.add(linear, self.recipe.choose(weight, stats, self.targets[linear.name]))
        writer.finish(parts, layer)

    def _prune_layer(self, walk: Walk, layer: DecoderLayer, parts: Parts) -> None:
        """With propagation: dense weights, pruned inputs."""
        groups = [group for group in walk.groups(layer) if any(one.name in self._chosen for one in group.linears)]
        stats = self._collect(walk, layer, groups, self.recipe.needs)
        writer = _PartWriter(self)
        factors: dict[int, Any] = {}
        for number, group in enumerate(groups):
            if self.recipe.input_recalc and number:
                self._recalculate(walk, layer, group, stats)
            for linear in group.linears:
                if linear.name in self._chosen:
                    # The stored weight, not the layer's: the computation may run in fewer bits.
                    weight = self.skeleton.read_weight(linear).to(self.skeleton.device)
                    outcome = self.recipe.choose(weight, stats[linear.name], self.targets[linear.name], factors)
                    writer.add(linear, outcome)
                    apply_outcome(linear, outcome.keep, writer.weight(linear))
            factors.clear()
            for linear in group.linears:
                stats.pop(linear.name, None)
        writer.finish(parts, layer)

    def _collect(
        self, walk: Walk, layer: DecoderLayer, groups: list[InputGroup], needs: frozenset[Statistic]
    ) -> dict[str, LinearStats]:
        if not groups:
            return {}
        gram = torch.float64 if self.options.gram_dtype == "float64" else torch.float32
        collector = Collector(groups, needs, walk.nsamples, self.skeleton.device, gram)
        walk.collect(layer, collector)
        return collector.by_linear()

    def _recalculate(
        self, walk: Walk, layer: DecoderLayer, group: InputGroup, stats: dict[str, LinearStats]
    ) -> None:
        """Last-token inputs anew, the linears before the group now being pruned (TRIM's input recalculation)."""
        reference = self.recipe.numerics == "reference"
        needs = {Statistic.INPUTS}
        if reference and Statistic.SQNORM in self.recipe.needs:
            needs.add(Statistic.SQNORM)
        again = self._collect(walk, layer, [group], frozenset(needs))
        for position, linear in enumerate(group.linears):
            before, after = stats[linear.name], again[linear.name]
            sqnorm = before.sqnorm
            if position and sqnorm is not None and after.sqnorm is not None:
                # The published code goes on adding to the norms of the linears whose turn has not come.
                sqnorm = (sqnorm + after.sqnorm) / 2
            stats[linear.name] = replace(before, sqnorm=sqnorm, inputs=after.inputs)

    def _replay(self, layer: DecoderLayer, part: Part) -> None:
        for linear in self._mine(layer):
            key = f"{linear.name}.weight"
            keep = masks.unpack(part.load(f"{linear.name}.keep"), linear.d_in)
            apply_outcome(linear, keep, part.load(key) if key in part.names else None)

    def _rebuild(self, walk: Walk, layer: DecoderLayer, part: Part, second: Parts) -> None:
        assert self.recipe.barber is not None
        mine = self._mine(layer)
        dense = {linear.name: linear.module.weight.detach().clone() for linear in layer.linears}  # type: ignore[operator, union-attr]
        self._replay(layer, part)
        keep = {linear.name: masks.unpack(part.load(f"{linear.name}.keep"), linear.d_in) for linear in mine}
        pattern = self.targets[mine[0].name].pattern if mine else None
        writer = _PartWriter(self)
        outcomes = rebuild_layer(walk, layer, dense, keep, pattern, self.recipe.barber) if mine else {}
        for linear in mine:
            keep_new, weight = outcomes[linear.name]
            writer.add(linear, Outcome(keep_new, weight if self.recipe.changes_weights else None))
            if writer.weight(linear) is not None:
                apply_outcome(linear, keep_new, writer.weight(linear))
        writer.finish(second, layer)

    # --- the results -------------------------------------------------------------------------------------

    def write(self, parts: Parts, output: Path, *, force: bool, rows: Parts) -> PruneSummary:
        """The masks file, and on request the model directory and TRIM's findings, from the part files."""
        found = {layer.index: parts.read(layer.index) for layer in self.skeleton.layers}
        homes = {linear.name: found[layer.index] for layer in self.skeleton.layers for linear in self._mine(layer)}
        remarks = tuple(remark for part in found.values() for remark in part.facts["remarks"])
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
            numerics=self.recipe.numerics,
            remarks=list(remarks),
            compute_dtype=str(self.skeleton.dtype).removeprefix("torch."),
        )

        def keep(name: str) -> Tensor:
            return masks.unpack(homes[name].load(f"{name}.keep"), self.skeleton.linears[name].d_in)

        shapes = {linear.name: linear.shape for linear in self.linears}
        complete = write_masks(output, document, shapes, keep, force=force)
        if options.save_model:
            self._write_model(options.save_model, complete, homes, keep, force=force)
        improved = None
        if options.recipe.rows:
            facts = {name: fact for layer in self.skeleton.layers for name, fact in rows.read(layer.index).facts["rows"].items()}
            improved = sum(fact["step"] != 0 for fact in facts.values())
            if options.stats_out:
                write_row_stats(options.stats_out, complete, facts, rows, len(self.skeleton.layers), force=force)
        return self._summary(output, complete, remarks, improved)

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
            if f"{linear.name}.weight" in part.names:
                return part.load(f"{linear.name}.weight")
            dense = self.skeleton.checkpoint.load(key)
            return dense.masked_fill(linear.oriented(~keep(linear.name)), 0)

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
            mine = self._mine(layer)
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


class _PartWriter:
    """Gathers one layer's outcomes on the CPU and leaves them as a part file."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._tensors: dict[str, Tensor] = {}
        self._rows: dict[str, Any] = {}
        self._remarks: list[str] = []

    def add(self, linear: Linear, outcome: Outcome) -> None:
        """Take one matrix's masks, and its weights as the checkpoint will store them."""
        self._tensors[f"{linear.name}.keep"] = masks.pack(outcome.keep).cpu()
        if outcome.weight is not None:
            assert linear.key is not None
            stored = self._run.skeleton.checkpoint.spec(linear.key).dtype
            self._tensors[f"{linear.name}.weight"] = linear.oriented(outcome.weight).to("cpu", stored).contiguous()
        if outcome.rows is not None:
            self._rows[linear.name] = row_facts(outcome.rows, self._run.targets[linear.name].sparsity)
            self._tensors.update(row_tensors(linear.name, outcome.rows))
        for remark in outcome.remarks:
            self._remarks.append(f"{linear.name}: {remark}")
            self._run.progress.warn(self._remarks[-1])

    def weight(self, linear: Linear) -> Tensor | None:
        """The new weight in stored orientation and dtype, None where the dense values stay."""
        return self._tensors.get(f"{linear.name}.weight")

    def finish(self, parts: Parts, layer: DecoderLayer) -> None:
        """Write the part: the layer is finished."""
        parts.write(layer.index, self._tensors, {"rows": self._rows, "remarks": self._remarks})


def apply_outcome(linear: Linear, keep: Tensor, stored: Tensor | None) -> None:
    """Make the loaded layer's linear sparse: new weights where there are any (stored orientation), zeros elsewhere."""
    parameter: Tensor = linear.module.weight.data  # type: ignore[assignment, union-attr]
    if stored is not None:
        parameter.copy_(stored)
    linear.weight.masked_fill_(~keep.to(parameter.device), 0)
