"""The passes over a model that choose masks: layer by layer, one resident, each leaving a part file when finished."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from trimcli.console import Progress
from trimcli.files.calibration import CalibrationFile
from trimcli.files.names import grouped, layer_of
from trimcli.files.parts import Part, Parts
from trimcli.files.rowstats import row_facts, row_tensors
from trimcli.memory import return_what_was_kept
from trimcli.methods import masks
from trimcli.methods.blocks.learn import Learned
from trimcli.methods.blocks.reconstruct import Reconstructed
from trimcli.methods.choice import Target
from trimcli.methods.recipe import Outcome, Recipe
from trimcli.methods.scores import wanda
from trimcli.methods.stats import INPUTS, SQNORM, STATISTICS, LinearStats
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import DecoderLayer, Skeleton
from trimcli.pipeline.collector import Collector, InputGroup, refuse_unusable
from trimcli.pipeline.estimate import walks
from trimcli.pipeline.plan import gathered_together
from trimcli.pipeline.rebuild import blocks_of, rebuild_layer
from trimcli.pipeline.reconstruct import Guide, learn_layer, parameter_inside, reconstruct_layer
from trimcli.pipeline.walk import Walk, own_samples
from trimcli.world import Found, World, current


@dataclass(frozen=True)
class Passes:
    """What the passes work with; targets: by linear that is pruned. calibration: None where nothing is read of it.

    Every one of several ranks walks with its share of the samples, and works on some of a layer's matrices.
    """

    skeleton: Skeleton
    recipe: Recipe
    targets: Mapping[str, Target]
    calibration: CalibrationFile | None
    progress: Progress
    batch_size: int | None = None
    keep_zeros: bool = False
    world: World = field(default_factory=current)

    def first(self, parts: Parts) -> int:
        """Choose the masks layer by layer, leaving a part file each. Returns how many an earlier run had left."""
        done = parts.finished()
        if walks(self.recipe):
            self._along_walk("pruning layers", parts, self._prune_layer)
        elif left := self.layers[done:]:
            with self.progress.task("pruning layers", done + len(left)) as step:
                step(done)
                for layer in left:
                    self._prune_from_file(layer).finish(parts, layer)
                    step()
        return done

    @cached_property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, and the like of them outside of these, such as a vision tower's, that are pruned."""
        skeleton = self.skeleton
        mine = [linear for name, linear in skeleton.outside.items() if name in self.targets]
        beyond = enumerate(grouped(mine, lambda linear: layer_of(linear.name)).items(), start=len(skeleton.layers))
        get = skeleton.model.get_submodule
        return [*skeleton.layers, *(DecoderLayer(index, name, get(name), found) for index, (name, found) in beyond)]

    def second(self, first: Parts, second: Parts) -> int:
        """Rebuild the masks of `first` layer by layer into `second` (LLM-Barber). Returns the like of `first`."""
        return self._along_walk("rebuilding layers", second, partial(self._rebuild, first))

    @property
    def nsamples(self) -> int:
        """N, the samples of all ranks."""
        return self.calibration.nsamples if self.calibration else 0

    def _walk(self) -> Walk:
        assert self.calibration is not None, "a recipe that walks has been given tokens"
        mine = own_samples(self.calibration.samples)
        batch_size, wanted = self.batch_size, self.targets
        return Walk(self.skeleton, mine, batch_size=batch_size, wanted=wanted, progress=self.progress)

    def _along_walk(
        self, title: str, parts: Parts, work: Callable[[Walk, DecoderLayer, Guide | None], "PartWriter"]
    ) -> int:
        """`work` on the layers that have no part file yet, each with the outputs of the sparse layers before it."""
        done, total = parts.finished(), len(self.skeleton.layers)
        if done == total:
            return done
        with self.progress.task(title, total) as step:
            walk, guide = self._walk(), None
            if self.recipe.needs_dense_walk:
                guide = Guide(self._walk(), self.recipe)
            for layer in walk.layers():
                if layer.index < done:
                    if guide is not None:
                        guide.advance(layer)
                    self._replay(layer, parts.read(layer.index))
                else:
                    work(walk, layer, guide).finish(parts, layer)
                if not self.skeleton.is_last(layer):
                    walk.advance(layer)
                step()
        return done

    def mine(self, layer: DecoderLayer) -> list[Matrix]:
        """The layer's linears that are pruned."""
        return [linear for linear in layer.linears if linear.name in self.targets]

    def _stored(self, linear: Matrix) -> Tensor:
        """The weight [D_out, D_in] as stored, on the compute device: the layer's own may have fewer bits."""
        return linear.read(self.skeleton.checkpoint).to(self.skeleton.device)

    def _dense(self, linear: Matrix) -> Tensor:
        """`_stored` of a linear that is loaded and not pruned yet: its own weight where that has every bit of it."""
        assert linear.key is not None
        own, stored = self.skeleton.dtype, self.skeleton.checkpoint.spec(linear.key).dtype
        return linear.weight if torch.promote_types(own, stored) == own else self._stored(linear)

    def _prune_from_file(self, layer: DecoderLayer) -> "PartWriter":
        """Without propagation: statistics from the calibration file, one matrix in memory."""

        def stats_of(linear: Matrix) -> LinearStats:
            stats = LinearStats()
            if self.recipe.needs and self.calibration:
                stats = self.calibration.statistics(linear.name, linear.d_in)
                refuse_unusable(stats, linear.name)
                moved = {name: tensor.to(self.skeleton.device) for name, tensor in stats.tensors.items()}
                stats = LinearStats(stats.tokens, **moved)
            return stats

        writer = PartWriter(self)
        for _ in self._outcomes(writer, self.mine(layer), self._stored, stats_of):
            pass
        return writer

    def _prune_layer(self, walk: Walk, layer: DecoderLayer, guide: Guide | None) -> "PartWriter":
        """With propagation: dense weights, pruned inputs. guide: to what the dense layer gives, not yet past it."""
        writer, keep = PartWriter(self), dict[str, Tensor]()
        pruned: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        if not self.mine(layer):
            if guide is not None:
                guide.advance(layer)
            return writer
        if self.recipe.barber and layer.index == 0:
            blocks_of(walk, layer)  # what the second pass cannot work on is refused before the first one is done
        groups = walk.groups(layer)
        parts = gathered_together(groups, self.recipe, self.nsamples)
        again = self.recipe.input_recalc
        for place, part in enumerate(parts):
            stats = self._collect(walk, layer, part, self.recipe.needs, guide.walk if guide else None)
            if guide is not None and not place:
                guide.advance(layer, walk)  # before anything in it is pruned
            for number, stage in enumerate([[group] for group in part] if again else [part]):
                if again and number:
                    self._recalculate(walk, layer, stage[0], stats)
                linears = [linear for group in stage for linear in group.linears]
                for linear, mask in self._outcomes(writer, linears, self._dense, partial(_stats_in, stats)):
                    if self.recipe.refine == "learned":
                        weight = self._stored(linear)
                        pruned[linear.name] = weight, mask, wanda(weight, stats[linear.name])
                    if len(parts) == 1:  # else what is yet to be gathered still needs the dense layer
                        linear.write(writer.weight(linear), mask)
                    keep[linear.name] = mask
                    del stats[linear.name]
        for linear in self.mine(layer) if len(parts) > 1 else ():
            linear.write(writer.weight(linear), keep[linear.name])
        if guide is not None and pruned:
            keep, learned = learn_layer(walk, guide, layer, pruned, self.targets, self.recipe)
            writer.relearn(keep, learned)
            for linear in self.mine(layer):
                linear.write(pruned[linear.name][0], keep[linear.name])
        if guide is not None and self.recipe.reconstructs:
            writer.refit(layer, reconstruct_layer(walk, guide, layer, keep, self.recipe))
        return writer

    def _outcomes(
        self,
        writer: "PartWriter",
        linears: Sequence[Matrix],
        weight: Callable[[Matrix], Tensor],
        stats: Callable[[Matrix], LinearStats],
    ) -> Iterator[tuple[Matrix, Tensor]]:
        """Choose masks and weights, which `writer` takes; each linear in order with its mask, bool [D_out, D_in]."""
        made: dict[str, Tensor] = {}

        def work(linear: Matrix) -> Found:
            return_what_was_kept()
            target, known = self.targets[linear.name], stats(linear)
            outcome = self.recipe.choose(weight(linear), known, target, keep_zeros=self.keep_zeros)
            outcome = replace(outcome, tokens=known.tokens)
            made[linear.name] = outcome.keep
            return writer.packed(linear, outcome)

        # What reads a Gram inverts it, or solves with it, for every row.
        solves = any(STATISTICS[name].copies for name in self.recipe.needs)
        for linear, found in self.world.divided(linears, work, lambda one: one.numel * (one.d_in if solves else 1)):
            writer.take(linear, found)
            yield linear, made.pop(linear.name) if linear.name in made else writer.mask(linear)

    def _collect(
        self,
        walk: Walk,
        layer: DecoderLayer,
        groups: list[InputGroup],
        needs: frozenset[str],
        dense: Walk | None = None,
    ) -> dict[str, LinearStats]:
        if not needs:  # magnitude, in a walk that is there for the reconstruction
            return {linear.name: LinearStats() for group in groups for linear in group.linears}
        device = self.skeleton.device
        beside = None
        if dense is not None and self.recipe.target == "dense":
            beside = partial(_on_dense_states, walk, dense, layer)
        collector = Collector(groups, needs, self.nsamples, walk.tokens, device, self.recipe.options_of, beside)
        walk.collect(layer, collector)
        return collector.by_linear()

    def _recalculate(self, walk: Walk, layer: DecoderLayer, group: InputGroup, stats: dict[str, LinearStats]) -> None:
        """Last-token inputs anew, the linears before the group now being pruned (TRIM's input recalculation)."""
        # The published code goes on adding to the norms of the linears whose turn has not come.
        adding = self.recipe.numerics == "reference" and SQNORM.name in self.recipe.needs
        needs = {INPUTS.name, SQNORM.name} if adding else {INPUTS.name}
        again = self._collect(walk, layer, [group], frozenset(needs))
        for position, linear in enumerate(group.linears):
            before, after = stats[linear.name], again[linear.name]
            anew = {"inputs": after.tensors.get(INPUTS.name)}  # of an expert, perhaps, that fewer tokens reach by now
            if adding and position:
                anew["sqnorm"] = (before.sqnorm + after.sqnorm) / 2
            stats[linear.name] = before.with_(**anew)

    def _replay(self, layer: DecoderLayer, part: Part) -> dict[str, tuple[Tensor | None, Tensor]]:
        """Make the loaded layer what its part file says: by linear the weight, where that changed, and the mask."""
        found = {}
        for linear in self.mine(layer):
            keep = masks.unpack(part.load(f"{linear.name}.keep"), linear.d_in)
            found[linear.name] = part.weight(linear.name), keep
            linear.write(*found[linear.name])
        for name in part.facts.get("fitted", ()):
            layer.module.get_parameter(name).copy_(part.load(f"{layer.name}.{name}"))
        return found

    def _rebuild(self, first: Parts, walk: Walk, layer: DecoderLayer, _: Guide | None) -> "PartWriter":
        writer = PartWriter(self)
        if not (mine := self.mine(layer)):
            return writer
        # As stored, not as computed with: what returns returns with all its bits.
        stored = {linear.name: self._stored(linear) for linear in layer.linears}
        found = self._replay(layer, first.read(layer.index))
        keep = {name: mask for name, (_, mask) in found.items()}
        changed = {name: weight for name, (weight, _) in found.items() if weight is not None}
        patterns = {linear.name: self.targets[linear.name].pattern for linear in mine}
        outcomes = rebuild_layer(walk, layer, stored, stored | changed, keep, patterns, self.recipe, self.nsamples)
        for linear in mine:
            mask, weight = outcomes[linear.name]
            outcome = Outcome(mask, weight if self.recipe.changes_weights else None)
            writer.take(linear, writer.packed(linear, outcome))
            linear.write(writer.weight(linear), mask)
        return writer


def _stats_in(stats: Mapping[str, LinearStats], linear: Matrix) -> LinearStats:
    return stats[linear.name]


def _on_dense_states(walk: Walk, dense: Walk, layer: DecoderLayer, rows: slice) -> Tensor:
    return walk.call(layer, rows, dense.states(rows))


class PartWriter:
    """Gathers one layer's outcomes on the CPU and leaves them as a part file."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._tensors: dict[str, Tensor] = {}
        self._rows: dict[str, Any] = {}
        self._fitted: list[str] = []
        self._errors: tuple[float, float] | None = None
        self._learned: tuple[float, float] | None = None
        self._remarks: list[str] = []
        self._reached: dict[str, int] = {}
        self._fewer: list[str] = []
        self._judged: dict[str, dict[str, tuple[float, float]]] = {}

    def packed(self, linear: Matrix, outcome: Outcome) -> Found:
        """One matrix's mask as bits, its weights as the checkpoint will store them, and what is to be said of it."""
        tensors = {f"{linear.name}.keep": masks.pack(outcome.keep).cpu()}
        facts: dict[str, Any] = {"warnings": list(outcome.remarks)}
        if outcome.weight is not None:
            assert linear.key is not None
            stored = self._passes.skeleton.checkpoint.spec(linear.key).dtype
            tensors[f"{linear.name}.weight"] = outcome.weight.to("cpu", stored).contiguous()
        if outcome.grid is not None:
            grid = {"scales": outcome.grid.scales, "zeros": outcome.grid.zeros}
            tensors |= {f"{linear.name}.{kind}": tensor.cpu() for kind, tensor in grid.items()}
        if outcome.rows is not None:
            facts["rows"] = row_facts(outcome.rows, self._passes.targets[linear.name].sparsity)
            tensors.update(row_tensors(linear.name, outcome.rows))
        if outcome.judged:
            facts["judged"] = {one.step: (one.before, one.after) for one in outcome.judged}
        facts["remarks"] = [one.remark for one in outcome.judged if not one.better]
        facts |= {"tokens": outcome.tokens, "fewer": outcome.fewer}
        return Found(tensors, facts)

    def take(self, linear: Matrix, found: Found) -> None:
        """Take one matrix's masks and weights, as `packed` gave them on any rank."""
        self._tensors.update(found.tensors)
        for kept, name in ((self._rows, "rows"), (self._judged, "judged")):
            if name in found.facts:
                kept[linear.name] = found.facts[name]
        self._remarks += [f"{linear.name}: {remark}" for remark in found.facts["remarks"]]
        if found.facts["tokens"] is not None:
            self._reached[linear.name] = found.facts["tokens"]
        if found.facts["fewer"] is not None:
            self._fewer.append(f"{linear.name}: {found.facts['fewer']}")
        for remark in found.facts["warnings"]:
            self._remarks.append(f"{linear.name}: {remark}")
            self._passes.progress.warn(self._remarks[-1])

    def mask(self, linear: Matrix) -> Tensor:
        """The mask, bool [D_out, D_in], on the CPU."""
        return masks.unpack(self._tensors[f"{linear.name}.keep"], linear.d_in)

    def relearn(self, keep: Mapping[str, Tensor], made: Learned) -> None:
        """Take the masks that were learned in place of those chosen."""
        self._learned = made.before, made.after
        for name, mask in keep.items():
            self._tensors[f"{name}.keep"] = masks.pack(mask).cpu()

    def refit(self, layer: DecoderLayer, made: Reconstructed) -> None:
        """Take what a reconstruction made of the layer's parameters, which the layer then holds as they are stored."""
        checkpoint, values = self._passes.skeleton.checkpoint, dict(made.values)
        self._errors = made.before, made.after
        for linear in self._passes.mine(layer):
            assert linear.key is not None
            value = values.pop(parameter_inside(layer, linear))
            weight = linear.inside(value).to("cpu", checkpoint.spec(linear.key).dtype).contiguous()
            self._tensors[f"{linear.name}.weight"] = weight
            linear.weight.copy_(weight)
        for name, value in values.items():
            key = self._passes.skeleton.key_of(f"{layer.name}.{name}")
            assert key is not None
            self._tensors[f"{layer.name}.{name}"] = value.to("cpu", checkpoint.spec(key).dtype)
            layer.module.get_parameter(name).copy_(self._tensors[f"{layer.name}.{name}"])
            self._fitted.append(name)

    def weight(self, linear: Matrix) -> Tensor | None:
        """The new weight [D_out, D_in] in the stored dtype, None where the dense values stay."""
        return self._tensors.get(f"{linear.name}.weight")

    def finish(self, parts: Parts, layer: DecoderLayer) -> None:
        """Write the part: the layer is finished."""
        if self._fewer:  # of hundreds of experts perhaps
            more = f"; and {len(self._fewer) - 1:,} more matrices of experts like it" if len(self._fewer) > 1 else ""
            self._passes.progress.warn(f"{self._fewer[0]}{more}.")
            self._remarks += self._fewer
        facts = {"rows": self._rows, "remarks": self._remarks, "fitted": self._fitted, "errors": self._errors}
        facts |= {"judged": self._judged, "learned": self._learned, "tokens": self._reached}
        parts.write(layer.index, self._tensors, facts)
