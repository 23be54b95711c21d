"""`trim alloc-layers`: a sparsity for every linear of a model, the target on average."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from trimcli.commands.options import AllocateOptions
from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError, OptionError
from trimcli.files.cache import spill_folder
from trimcli.files.calibration import CalibrationFile
from trimcli.files.documents import write_json
from trimcli.files.imports import read_keep_ratios, read_metrics
from trimcli.files.metrics_cache import MetricsCache
from trimcli.files.outputs import check_outputs, inputs_of
from trimcli.files.ratios import LayerSparsity
from trimcli.methods.layers.base import spread
from trimcli.methods.layers.projection import settle, weighted_mean
from trimcli.methods.stats import LinearStats
from trimcli.model.skeleton import Skeleton, open_model
from trimcli.pipeline.collector import refuse_unusable
from trimcli.pipeline.estimate import one_matrix
from trimcli.pipeline.fit import Fit, Work, fit
from trimcli.pipeline.plan import fit_trials
from trimcli.pipeline.proof import prove
from trimcli.pipeline.selection import chosen_linears
from trimcli.pipeline.trial import divergences
from trimcli.pipeline.walk import sample_length
from trimcli.world import Found, World, current, joined

# A target further than this from the mean of imported keep ratios was meant for another file.
IMPORT_TOLERANCE = 0.005
# How far patterns of whole weights may end from the target before it is said.
PATTERN_TOLERANCE = 0.005

T = TypeVar("T")


def allocate(
    model: str,
    output: Path | None,
    options: AllocateOptions,
    *,
    progress: Progress = NO_PROGRESS,
    force: bool = False,
    announce: Callable[[Fit], None] | None = None,
) -> LayerSparsity:
    """Distribute a target over a model's linears, and write the ratios file, if asked for. UsageError, HubError.

    announce: is given how it will keep to memory. Raises ResourceError where it could not within the limits.
    """
    options.check()
    inputs = inputs_of(options, model)
    check_outputs(inputs, texts=[output], kept=[options.metrics_cache], force=force)
    with joined() as world:
        return _allocated(model, output, options, world, progress, force, announce)


def _allocated(
    model: str,
    output: Path | None,
    options: AllocateOptions,
    world: World,
    progress: Progress,
    force: bool,
    announce: Callable[[Fit], None] | None,
) -> LayerSparsity:
    chosen = options.allocating
    skeleton = open_model(model, options, weights=not chosen.config_only and options.import_file is None, images=None)
    if skeleton.images and chosen.tries:
        what = f"--method {options.method} tries candidates on text, and {model} is an image classifier"
        raise OptionError(f"{what}; take another, such as owl or alpha.")
    if not skeleton.linears:
        raise InputError(f"{model} has no linears in its decoder layers to prune; give another model.")
    survey = _ModelSurvey(skeleton, options, progress)
    kept = _kept_in_memory(skeleton, survey, options)
    if kept is not None and announce:
        announce(kept)
    if chosen.tries:
        prove(skeleton, options.cache_dir, progress)
    if kept is not None:
        kept.hold(skeleton)
    try:
        target = _target(survey, options)
        proposed = chosen(survey, target, options=options.own())
    finally:
        if world.is_first:
            survey.metrics.save()
    final = proposed.sparsity
    if proposed.pattern is None:
        final = settle(final, survey.counts, target, options.numerics)
    elif abs(missed := weighted_mean(final, survey.counts) - target) > PATTERN_TOLERANCE:
        what = f"the patterns that groups of {proposed.pattern[0][1]} allow take {target + missed:.2%} of the weights"
        progress.warn(f"{what} where {target:.2%} were asked for; a larger --group comes nearer.")
    names = survey.names
    if beyond := int((final > 1).sum()):
        what = f"{beyond} of {len(names)} linears a sparsity above 1, the largest {float(final.max()):.4g}"
        progress.warn(f"reference numerics leave {what}: all their weights would go.")
    imported = {} if options.import_file is None else {"import": options.import_file.name}
    result = LayerSparsity(
        method=options.method,
        parameters={**proposed.parameters, **imported},
        target=target,
        numerics=options.numerics,
        sparsity=dict(zip(names, final.tolist(), strict=True)),
        metric=dict(zip(names, proposed.metric, strict=True)),
        pattern=None if proposed.pattern is None else dict(zip(names, proposed.pattern, strict=True)),
        model=skeleton.fingerprint,
    )
    if output is not None and world.is_first:
        sources = {"calibration": options.calibration, "import": options.import_file}
        write_json(output, result.document(options.document(), sources), force=force)
    return result


def _kept_in_memory(skeleton: Skeleton, survey: "_ModelSurvey", options: AllocateOptions) -> Fit | None:
    """How the allocation keeps to memory; None where it looks at nothing larger than a config."""
    if options.trials is not None:
        nsamples, seqlen = survey.samples, survey.seqlen
        where: dict[str, Any] = {"spill": options.spill, "otherwise": spill_folder(options.cache_dir)}
        return fit_trials(skeleton, options.trials, nsamples=nsamples, seqlen=seqlen, **where)
    if options.allocating.config_only or options.import_file is not None:
        return None
    words = f"the allocation {options.method} of {skeleton.checkpoint.id}"
    return fit(skeleton, Work(words, lambda *_: one_matrix(skeleton, options.allocating.weight_bytes), 1, 1))


class _ModelSurvey:
    """What an allocation may look at (`trimcli.methods.layers.base.Survey`), from a model and the files given."""

    def __init__(self, skeleton: Skeleton, options: AllocateOptions, progress: Progress) -> None:
        self._skeleton, self._options, self._progress = skeleton, options, progress
        chosen = chosen_linears(skeleton, options.only, options.skip, progress)
        self.shapes: Mapping[str, tuple[int, int]] = {linear.name: linear.shape for linear in chosen}
        self.names: Sequence[str] = list(self.shapes)
        layers = [[one.name for one in layer.linears if one.name in self.shapes] for layer in skeleton.layers]
        self.layers: Sequence[Sequence[str]] = [names for names in layers if names]
        self.counts = torch.tensor([d_out * d_in for d_out, d_in in self.shapes.values()], dtype=torch.float64)
        self.seed = options.seed
        self.imported: Tensor | None = None
        if options.import_file is not None and options.allocating.imports == "ratios":
            self.imported = read_keep_ratios(options.import_file, len(self.layers))
        elif options.import_file is not None:
            self.imported = read_metrics(options.import_file, len(self.names))
        self._calibration: CalibrationFile | None = None
        if options.calibration is not None:
            self._calibration = CalibrationFile(options.calibration)
            self._calibration.check(skeleton.fingerprint)
            self._calibration.require(options.allocating.needs)
        self.samples, self.seqlen = 0, 0
        if self._calibration is not None:
            self.samples = self._calibration.nsamples
            self.seqlen = sample_length(skeleton, self._calibration.shape)
        self.metrics = MetricsCache(options.metrics_cache, skeleton.fingerprint)

    def weight(self, name: str) -> Tensor:
        """A linear's weight [D_out, D_in] as stored, on the compute device."""
        return self._skeleton.linears[name].read(self._skeleton.checkpoint).to(self._skeleton.device)

    def stats(self, name: str) -> LinearStats:
        """Its statistics on dense inputs, on the compute device."""
        assert self._calibration is not None, "checked by AllocateOptions.check"
        found = self._calibration.statistics(name, self.shapes[name][1])
        refuse_unusable(found, name)
        needs = self._options.allocating.needs
        return LinearStats(**{kind: found.tensors[kind].to(self._skeleton.device) for kind in needs})

    def losses(self, candidates: Sequence[Tensor], samples: slice) -> list[float]:
        """Nats a token from the dense model's predictions on these samples, pruned by wanda to each candidate [n]."""
        assert self._calibration is not None, "checked by AllocateOptions.check"
        by_name = [dict(zip(self.names, candidate.tolist(), strict=True)) for candidate in candidates]
        tokens = self._calibration.tokens[samples]
        return divergences(self._skeleton, by_name, self.stats, tokens, progress=self._progress)

    def remembered(self, metric: str, find: Callable[[str], Mapping[str, float]]) -> list[float]:
        """Every linear's metric, from the metrics file or measured and kept there."""
        missing = [name for name in self.names if self.metrics.get(metric, name) is None]

        def work(name: str) -> Found:
            return Found({}, dict(find(name)))

        with self._progress.task(metric, len(missing)) as advance:
            for name, found in current().divided(missing, work, lambda name: math.prod(self.shapes[name])):
                for other, value in found.facts.items():
                    self.metrics.put(other, name, value)
                if self.metrics.get(metric, name) is None:
                    what = f"the metric {metric} of {name} in {self._skeleton.checkpoint.directory}"
                    raise InputError(f"{what} is not a finite number; choose another --ww-metric.")
                advance()
        return [self.metrics.values[metric][name] for name in self.names]

    def each(self, title: str, items: Sequence[T]) -> Iterator[T]:
        """The items, with progress."""
        with self._progress.task(title, len(items)) as advance:
            for item in items:
                yield item
                advance()


def _target(survey: _ModelSurvey, options: AllocateOptions) -> float:
    """The target: as asked for, or what imported keep ratios come to. Raises OptionError where these disagree."""
    if survey.imported is None or options.allocating.imports != "ratios":
        assert options.sparsity is not None, "checked by AllocateOptions.check"
        return options.sparsity
    mean = weighted_mean(spread(survey, 1 - survey.imported), survey.counts)
    if options.sparsity is not None and abs(options.sparsity - mean) > IMPORT_TOLERANCE:
        what = f"{options.import_file} holds keep ratios for a sparsity of {mean:.4g}"
        raise OptionError(f"{what}, not for --sparsity {options.sparsity:g}; leave --sparsity out.")
    return mean if options.sparsity is None else options.sparsity
