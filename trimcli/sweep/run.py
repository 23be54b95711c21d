"""`trim sweep`: a grid from one calibration, measured on further samples that share no run of 16 tokens with it.

No test set is read, so choosing by these figures leaves every test figure honest.
"""

import math
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimcli.commands.evaluate import open_masks
from trimcli.commands.options import CalibrateOptions, prune_words
from trimcli.commands.plan import foreseen
from trimcli.commands.prune import prune
from trimcli.commands.resolve import cached_calibration
from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError, OptionError
from trimcli.evaluation.perplexity import keep_in_memory, perplexity
from trimcli.files.atomic import atomic_file
from trimcli.files.cache import Cache, digest, spill_folder
from trimcli.files.calibration import CalibrationFile
from trimcli.files.documents import read_json, write_json
from trimcli.files.manifest import installed, manifest
from trimcli.files.outputs import check_outputs, inputs_of
from trimcli.files.tensors import TensorSpec, dtype_name, write_tensors
from trimcli.methods.stats import stored_statistics
from trimcli.model.skeleton import Skeleton, open_model
from trimcli.pipeline.estimate import walks
from trimcli.pipeline.fit import Fit
from trimcli.pipeline.plan import forward_passes
from trimcli.pipeline.proof import open_proven
from trimcli.pipeline.selection import chosen_linears
from trimcli.pipeline.walk import default_seqlen
from trimcli.sweep.grid import Setting, SweepOptions, settings_of
from trimcli.text.tokens import calibration_tokens, load_tokenizer, read_tokens

SWEEP = "trim.sweep/1"
# Samples with this many consecutive tokens in common have seen the same text.
RUN_LENGTH = 16
# Further samples drawn, in turn, in multiples of --holdout, until as many share nothing with the others.
DRAWS = (2, 8, 32, 128)


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do: settings, samples of seqlen tokens, and forward passes of one sample in all."""

    settings: int
    nsamples: int
    holdout: int
    seqlen: int
    sample_passes: int


@dataclass(frozen=True)
class Run:
    """One row of the table: perplexity on the held-out samples; values and command are empty for the dense model."""

    values: Mapping[str, Any]
    perplexity: float
    sparsity: float
    seconds: float
    command: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found, best perplexity first, NaN last. taken_over: how many an earlier sweep had measured."""

    dense: Run
    runs: tuple[Run, ...]
    heldout: int
    seqlen: int
    taken_over: int
    document: Mapping[str, Any]


def sweep(
    model: str,
    options: SweepOptions,
    output: Path | None = None,
    *,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
    announce: Callable[[SweepPlan], None] | None = None,
) -> SweepResult:
    """Prune by every setting of a grid and measure each on held-out calibration samples.

    output: a JSON file of what was found. announce: is given the plan before any pass. What was measured stays in the
    stage cache, so that an interrupted sweep goes on. Raises InputError (too short a text), and what prune raises.
    """
    options.check()
    inputs = inputs_of(options, model)
    check_outputs(inputs, texts=[output], kept=[options.metrics_cache], force=force)
    settings = settings_of(options)
    skeleton = open_model(model, options)
    linears = chosen_linears(skeleton, options.only, options.skip, progress)
    for setting in settings if any(options.limits) else ():  # what would not fit is said before anything is measured
        asked = options.prune_options(setting, None, Path("pruned"))
        foreseen(skeleton, linears, replace(asked, calibrate=options.calibrate()))
    plan = _plan(skeleton, options, settings)
    _keep_in_memory(skeleton, options, plan.holdout, plan.seqlen)
    if announce:
        announce(plan)
    calibrate = _calibrate_options(options)
    path = cached_calibration(skeleton, replace(calibrate, stats=_stats(settings)), progress)
    heldout = held_out(skeleton, options, CalibrationFile(path).tokens)
    measurer = _Measurer(skeleton, options, path, heldout, progress)
    with progress.task("settings", len(settings) + 1) as step:
        dense = measurer.measure(None)
        step()
        runs = []
        for setting in settings:
            asked = replace(options.prune_options(setting, None, Path("pruned")), calibrate=calibrate, resume=True)
            command = shlex.join(["trim", "prune", model, "-o", "masks.safetensors", *prune_words(asked)])
            runs.append(replace(measurer.measure(setting), command=command))
            step()
    runs.sort(key=lambda run: (math.isnan(run.perplexity), run.perplexity))
    found: dict[str, Any] = {"dense": asdict(dense), "runs": [asdict(run) for run in runs]}
    found["heldout"] = {"samples": len(heldout), "seqlen": heldout.shape[1], "sha256": digest(heldout.tolist())}
    found |= {"compute_dtype": dtype_name(skeleton.dtype), "bos": CalibrationFile(path).manifest.get("bos")}
    document = manifest(SWEEP, "sweep", options.document(), skeleton.fingerprint, **found)
    if output is not None:
        write_json(output, document, force=force)
    return SweepResult(dense, tuple(runs), len(heldout), heldout.shape[1], measurer.taken_over, document)


def _keep_in_memory(skeleton: Skeleton, options: SweepOptions, samples: int, seqlen: int) -> Fit:
    """How measuring the held-out samples keeps to memory. Raises ResourceError where the limits leave no way."""
    where: dict[str, Any] = {"spill": options.spill, "otherwise": spill_folder(options.cache_dir)}
    return keep_in_memory(skeleton, samples, seqlen, batch_size=options.batch_size, **where)


def _plan(skeleton: Skeleton, options: SweepOptions, settings: list[Setting]) -> SweepPlan:
    nsamples, seqlen = options.nsamples, options.seqlen or default_seqlen(skeleton.config)
    if options.tokens is not None:
        samples, seqlen = read_tokens(options.tokens).shape
        nsamples = samples - options.holdout
        if nsamples < 1:
            left = f"--holdout {options.holdout} leaves none of the {samples} samples in {options.tokens}"
            raise OptionError(f"{left} to calibrate on; hold out fewer.")
    passes = (len(settings) + 1) * options.holdout + (nsamples if _stats(settings) else 0)
    passes += sum(round(forward_passes(one.recipe, len(skeleton.layers)) * nsamples) for one in settings)
    return SweepPlan(len(settings), nsamples, options.holdout, seqlen, passes)


def _stats(settings: list[Setting]) -> tuple[str, ...]:
    """The statistics that one calibration needs to serve every setting, as `calibrate --stats` names them."""
    needed: set[str] = set()
    for setting in settings:
        needed |= setting.needs | (frozenset() if walks(setting.recipe) else setting.recipe.needs)
    return tuple(option for option, one in stored_statistics().items() if one.name in needed)


def _calibrate_options(options: SweepOptions) -> CalibrateOptions:
    """The calibration: as drawn, or all but the last samples of --tokens, which then lie in the stage cache."""
    if options.tokens is None:
        return options.calibrate()
    samples = read_tokens(options.tokens)[: -options.holdout].contiguous()
    path = Cache(options.cache_dir).file("tokens", samples.tolist(), ".safetensors")
    if not path.is_file():
        with atomic_file(path) as temporary:
            spec = {"tokens": TensorSpec(samples.dtype, tuple(samples.shape))}
            write_tensors(temporary, spec, lambda _: samples, {"format": "pt"})
    return replace(options.calibrate(), tokens=path)


def held_out(skeleton: Skeleton, options: SweepOptions, seen: Tensor) -> Tensor:
    """Samples, int32 [holdout, seqlen], without a run of 16 tokens in common with `seen` [n, seqlen]; or InputError."""
    if options.tokens is not None:
        fresh = _unseen(read_tokens(options.tokens)[-options.holdout :], seen)
    else:
        directory = skeleton.checkpoint.directory
        tokenizer = load_tokenizer(directory, trust_remote_code=options.trust_remote_code)
        shared: dict[str, Any] = {"seqlen": seen.shape[1], "seed": options.seed, "bos": options.calibrate().bos}
        for times in DRAWS:
            nsamples = options.nsamples + times * options.holdout
            drawn = calibration_tokens(options.dataset, tokenizer, nsamples=nsamples, **shared)
            fresh = _unseen(drawn[options.nsamples :], seen)
            if len(fresh) >= options.holdout:
                break
    if len(fresh) < options.holdout:
        source = options.tokens or options.dataset
        few = f"{source} gives {len(fresh)} samples that share no text with the {len(seen)} calibration samples"
        more = f"and --holdout {options.holdout} asks for more"
        raise InputError(f"{few}, {more}; give a longer text, fewer --nsamples or a smaller --holdout.")
    return fresh[: options.holdout]


def _unseen(candidates: Tensor, seen: Tensor) -> Tensor:
    """The candidates [m, L] without those that share RUN_LENGTH consecutive tokens with `seen` [n, L]."""
    return candidates[~torch.isin(_runs(candidates), _runs(seen)).any(dim=1)]


def _runs(tokens: Tensor) -> Tensor:
    """A 64-bit hash of every run of consecutive tokens: int64 [n, L - RUN_LENGTH + 1]."""
    length = min(RUN_LENGTH, tokens.shape[1])
    count = tokens.shape[1] - length + 1
    hashes = torch.zeros(len(tokens), count, dtype=torch.int64)
    for offset in range(length):
        # Odd multipliers, so that the arithmetic modulo 2^64 loses nothing.
        hashes = hashes * 0x5851F42D4C957F2D + (tokens[:, offset : offset + count].long() * 2 + 1)
    return hashes


class _Measurer:
    """Prunes by a setting into a temporary folder and measures; what was measured before comes from the cache."""

    def __init__(
        self, skeleton: Skeleton, options: SweepOptions, calibration: Path, heldout: Tensor, progress: Progress
    ) -> None:
        self._model, self._options, self._progress = skeleton.checkpoint.id, options, progress
        self._calibration, self._heldout = calibration, heldout
        self._cache = Cache(options.cache_dir)
        self._metrics = self._cache.file("metrics", skeleton.fingerprint.document(), ".json")
        self._key: dict[str, Any] = {
            "trim": installed("trimcli"),
            "model": [skeleton.fingerprint.structure, skeleton.fingerprint.content],
            "calibration": digest(CalibrationFile(calibration).tokens.tolist()),
            "heldout": digest(heldout.tolist()),
            "compute": [skeleton.device.type, str(skeleton.dtype)],
        }
        self.taken_over = 0

    def measure(self, setting: Setting | None) -> Run:
        """One setting, or the dense model."""
        key, values = self._key, setting.values if setting else {}
        if setting:
            shared = {name: getattr(self._options, name) for name in ("sparsity", "only", "skip", "seed")}
            key = {**key, **shared, "values": dict(values), "recipe": setting.recipe.document()}
        path = self._cache.file("sweep", key, ".json")
        if self._options.resume and path.is_file():
            found = read_json(path, SWEEP)
            self.taken_over += 1
        else:
            started = time.monotonic()
            value, sparsity = self._pruned(setting) if setting else (self._perplexity(self._model), 0.0)
            seconds = time.monotonic() - started
            found = {"schema": SWEEP, "perplexity": value, "sparsity": sparsity, "seconds": seconds}
            write_json(path, found, force=True)
        # JSON has neither infinity nor NaN, so both come back as nothing.
        value = math.nan if found["perplexity"] is None else found["perplexity"]
        return Run(values, value if math.isfinite(value) else math.nan, found["sparsity"], found["seconds"])

    def _pruned(self, setting: Setting) -> tuple[float, float]:
        """Perplexity and sparsity."""
        with tempfile.TemporaryDirectory(prefix="trim-sweep-") as folder:
            masks, model = Path(folder) / "masks.safetensors", Path(folder) / "model"
            if setting.allocate is not None and setting.allocate.allocating.remembers:
                # One look at the matrices serves every epsilon.
                known = setting.allocate.metrics_cache or self._metrics
                setting = replace(setting, allocate=replace(setting.allocate, metrics_cache=known))
            options = self._options.prune_options(setting, self._calibration, model)
            summary = prune(self._model, masks, options, progress=self._progress)
            saved = setting.recipe.changes_weights
            return self._perplexity(str(model)) if saved else self._perplexity(self._model, masks), summary.sparsity

    def _perplexity(self, model: str, masks: Path | None = None) -> float:
        skeleton, size = open_proven(model, self._options, self._progress), self._options.batch_size
        _keep_in_memory(skeleton, self._options, *self._heldout.shape).hold(skeleton)
        mask = open_masks(masks, skeleton) if masks else None
        return perplexity(skeleton, self._heldout, mask=mask, batch_size=size, progress=self._progress)
