"""`trim alloc-layers`: a sparsity for every linear of a model, the target on average."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError, OptionError
from trimcli.files.atomic import refuse_existing
from trimcli.files.calibration import CalibrationFile
from trimcli.files.documents import write_json
from trimcli.files.imports import read_keep_ratios, read_metrics
from trimcli.files.metrics_cache import MetricsCache
from trimcli.files.ratios import LayerSparsity
from trimcli.methods.layers.alpha import sparsities
from trimcli.methods.layers.metrics import METRICS, cache_key, measure
from trimcli.methods.layers.owl import keep_ratios, kept_of_group, outlier_share
from trimcli.methods.layers.projection import settle, uniform, weighted_mean
from trimcli.methods.masks import Numerics
from trimcli.methods.scores import LinearStats, Statistic, score_function
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import DecoderLayer, Skeleton, open_model
from trimcli.options import RunOptions, check_sparsity, one_of

METHODS = ("uniform", "owl", "alpha")
MAPPINGS = ("block", "layer")
# A target further than this from the mean of imported keep ratios was meant for another file.
IMPORT_TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class AllocateOptions(RunOptions):
    """How to distribute the target.

    method: `uniform`, `owl` or `alpha`. sparsity: the target, in [0, 1). calibration: square norms for OWL.
    lambda_, hyper_m: OWL's. group: M of a mixed N:M allocation by OWL. ww_metric, epsilon, mapping_type:
    Alpha's. metrics_cache: JSON file of metrics, read and extended. import_file: keep ratios (owl) or metrics
    (alpha) saved by the published tools. The seed is that of the one metric that permutes weights.
    """

    method: str = "uniform"
    sparsity: float | None = None
    calibration: Path | None = None
    lambda_: float = 0.08
    hyper_m: float = 5.0
    group: int | None = None
    ww_metric: str = "alpha_peak"
    epsilon: float = 0.3
    mapping_type: str = "block"
    metrics_cache: Path | None = None
    numerics: Numerics = "exact"
    import_file: Path | None = None

    def check(self) -> None:
        """Raise OptionError for a value or a combination that is not usable."""
        one_of("--method", self.method, METHODS)
        one_of("--ww-metric", self.ww_metric, METRICS)
        one_of("--mapping-type", self.mapping_type, MAPPINGS)
        one_of("--numerics", self.numerics, ("exact", "reference"))
        numbers = {"--lambda": self.lambda_, "--hyper-m": self.hyper_m, "--epsilon": self.epsilon}
        for option, number in numbers.items():
            if not (math.isfinite(number) and number >= 0):
                raise OptionError(f"{option} {number:g} is not usable; give a number that is not negative.")
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        if self.group is not None and self.group < 2:
            raise OptionError(f"--group {self.group} is not usable; give 2 or more inputs.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        imported = self.import_file is not None
        for option, given, methods, meets_import in (
            ("--calibration", self.calibration is not None, ("owl",), False),
            ("--group", self.group is not None, ("owl",), False),
            ("--metrics-cache", self.metrics_cache is not None, ("alpha",), False),
            ("--import", imported, ("owl", "alpha"), True),
        ):
            if given and self.method not in methods:
                raise OptionError(
                    f"{option} does not go with --method {self.method}, only with {' or '.join(methods)}; "
                    "leave one of them out."
                )
            if given and imported and not meets_import:
                raise OptionError(f"{option} and --import exclude each other; leave one of them out.")
        if self.sparsity is None and not (imported and self.method == "owl"):
            raise OptionError(f"--method {self.method} needs --sparsity, the share of weights to prune.")
        if self.method == "owl" and self.calibration is None and not imported:
            raise OptionError("--method owl needs --calibration, a file that trim calibrate made for this model.")


@dataclass(frozen=True)
class _Plan:
    """What a method says before it is settled: per linear sparsity and metric; for mixed N:M the pattern."""

    target: float
    sparsity: Tensor
    metric: list[float | None]
    parameters: dict[str, Any]
    pattern: list[tuple[int, int]] | None = None


def allocate(
    model: str,
    output: Path | None,
    options: AllocateOptions,
    *,
    progress: Progress = NO_PROGRESS,
    force: bool = False,
) -> LayerSparsity:
    """Distribute a target over the linears of a model, and write the layer ratios file.

    model: a directory or a hub id; `uniform` and `import_file` need no more of it than its config.json.
    output: where the JSON file goes, None for nowhere. Raises OptionError, InputError, MismatchError,
    OutputExists and HubError.
    """
    options.check()
    if output is not None:
        refuse_existing(output, force=force)
    weights = options.method != "uniform" and options.import_file is None
    skeleton = open_model(model, options, weights=weights)
    if not skeleton.linears:
        raise InputError(f"{model} has no linears in its decoder layers to prune; give another model.")
    counts = torch.tensor([linear.numel for linear in skeleton.linears.values()], dtype=torch.float64)
    plan = _plan(skeleton, counts, options, progress)
    final = plan.sparsity
    if plan.pattern is None and options.method != "uniform":
        final = settle(final, counts, plan.target, options.numerics)
    names = list(skeleton.linears)
    beyond = int((final > 1).sum())
    if beyond:
        progress.warn(
            f"reference numerics leave {beyond} of {len(names)} linears a sparsity above 1, the largest "
            f"{float(final.max()):.4g}: all their weights would go."
        )
    result = LayerSparsity(
        method=options.method,
        parameters=plan.parameters,
        target=plan.target,
        numerics=options.numerics,
        sparsity=dict(zip(names, final.tolist(), strict=True)),
        metric=dict(zip(names, plan.metric, strict=True)),
        pattern=None if plan.pattern is None else dict(zip(names, plan.pattern, strict=True)),
        model=skeleton.fingerprint,
    )
    if output is not None:
        used = {"calibration": options.calibration, "import": options.import_file}
        sources = {role: path for role, path in used.items() if path is not None}
        write_json(output, result.document(options.document(), sources), force=force)
    return result


def _plan(skeleton: Skeleton, counts: Tensor, options: AllocateOptions, progress: Progress) -> _Plan:
    if options.method == "owl" and options.import_file is not None:
        return _imported_owl(skeleton, counts, options, options.import_file)
    assert options.sparsity is not None, "checked by AllocateOptions.check"
    if options.method == "owl":
        return _owl(skeleton, options, options.sparsity, progress)
    if options.method == "alpha":
        return _alpha(skeleton, counts, options, options.sparsity, progress)
    return _Plan(options.sparsity, uniform(len(counts), options.sparsity), [None] * len(counts), {})


def _imported_owl(skeleton: Skeleton, counts: Tensor, options: AllocateOptions, path: Path) -> _Plan:
    ratios = read_keep_ratios(path, len(_occupied(skeleton)))
    sparsity = _spread(skeleton, 1 - ratios)
    mean = weighted_mean(sparsity, counts)
    target = mean if options.sparsity is None else options.sparsity
    if abs(target - mean) > IMPORT_TOLERANCE:
        raise OptionError(
            f"{path} holds keep ratios for a sparsity of {mean:.4g}, not for --sparsity {target:g}; "
            "leave --sparsity out."
        )
    return _Plan(target, sparsity, [None] * len(counts), {"import": path.name})


def _owl(skeleton: Skeleton, options: AllocateOptions, target: float, progress: Progress) -> _Plan:
    for linear in skeleton.linears.values():
        if options.group is not None and linear.d_in % options.group:
            raise OptionError(
                f"--group {options.group} does not divide the {linear.d_in} inputs of {linear.name}; choose another."
            )
    outliers = _outliers(skeleton, options, progress)
    parameters: dict[str, Any] = {"lambda": options.lambda_, "hyper_m": options.hyper_m}
    metric: list[float | None] = list(_spread(skeleton, outliers).tolist())
    if options.group is None:
        sparsity = _spread(skeleton, 1 - keep_ratios(outliers, target, options.lambda_))
        return _Plan(target, sparsity, metric, parameters)
    kept = _spread(skeleton, torch.tensor(kept_of_group(outliers, target, options.group, options.lambda_)))
    sparsity = 1 - kept.double() / options.group
    pattern = [(count, options.group) for count in kept.tolist()]
    return _Plan(target, sparsity, metric, {**parameters, "group": options.group}, pattern)


def _outliers(skeleton: Skeleton, options: AllocateOptions, progress: Progress) -> Tensor:
    """OWL's D of every decoder layer, float64 [layers], from dense weights and the calibration's norms."""
    assert options.calibration is not None, "checked by AllocateOptions.check"
    calibration = CalibrationFile(options.calibration)
    calibration.check(skeleton.fingerprint)
    score = score_function("wanda")
    calibration.require(score.needs)

    def scored(linear: Matrix) -> Tensor:
        sqnorm = calibration.statistics(linear.name)[Statistic.SQNORM].to(skeleton.device)
        return score(linear.read(skeleton.checkpoint).to(skeleton.device), LinearStats(sqnorm=sqnorm))

    found = []
    layers = _occupied(skeleton)
    with progress.task("outliers", len(layers)) as advance:
        for layer in layers:
            found.append(outlier_share(partial(map, scored, layer.linears), options.hyper_m))
            advance()
    return torch.tensor(found, dtype=torch.float64)


def _alpha(skeleton: Skeleton, counts: Tensor, options: AllocateOptions, target: float, progress: Progress) -> _Plan:
    parameters: dict[str, Any] = {"epsilon": options.epsilon, "mapping_type": options.mapping_type}
    if options.import_file is not None:
        metrics = read_metrics(options.import_file, len(counts))
        parameters["import"] = options.import_file.name
    else:
        metrics = _metrics(skeleton, options, progress)
        parameters["ww_metric"] = options.ww_metric
    layers = _spread(skeleton, torch.arange(len(_occupied(skeleton))))
    by_block = options.mapping_type == "block"
    sparsity = sparsities(metrics, layers, counts, target, options.epsilon, by_block=by_block)
    return _Plan(target, sparsity, list(metrics.tolist()), parameters)


def _metrics(skeleton: Skeleton, options: AllocateOptions, progress: Progress) -> Tensor:
    """The metric of every linear, float64 [n]: from the cache, else computed and put there."""
    cache = MetricsCache(options.metrics_cache, skeleton.fingerprint)
    key = cache_key(options.ww_metric, options.seed)
    missing = [linear for name, linear in skeleton.linears.items() if cache.get(key, name) is None]
    try:
        with progress.task(options.ww_metric, len(missing)) as advance:
            for linear in missing:
                found = measure(
                    options.ww_metric,
                    linear.name,
                    linear.read(skeleton.checkpoint).to(skeleton.device),
                    options.seed,
                )
                for metric, value in found.items():
                    cache.put(cache_key(metric, options.seed), linear.name, value)
                if cache.get(key, linear.name) is None:
                    raise InputError(
                        f"the metric {options.ww_metric} of {linear.name} in {skeleton.checkpoint.directory} "
                        "is not a finite number; choose another --ww-metric."
                    )
                advance()
    finally:
        cache.save()
    return torch.tensor([cache.get(key, name) for name in skeleton.linears], dtype=torch.float64)


def _spread(skeleton: Skeleton, values: Tensor) -> Tensor:
    """One value per decoder layer [layers] -> one per linear [n]."""
    return values.repeat_interleave(torch.tensor([len(layer.linears) for layer in _occupied(skeleton)]))


def _occupied(skeleton: Skeleton) -> list[DecoderLayer]:
    """The decoder layers that have linears to prune."""
    return [layer for layer in skeleton.layers if layer.linears]
