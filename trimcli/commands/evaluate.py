"""The eval stage: perplexity or accuracy layer by layer, tasks through lm-eval, and the sparsity that was there."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from trimcli.commands.options import EvaluateOptions
from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError, MismatchError, OptionError
from trimcli.evaluation.images import accuracy, keep_pictures_in_memory
from trimcli.evaluation.perplexity import apply_masks, keep_in_memory, perplexity
from trimcli.files.cache import spill_folder
from trimcli.files.documents import read_mark, write_json
from trimcli.files.manifest import RESULTS, check_masks, manifest
from trimcli.files.masks import MaskFile
from trimcli.files.outputs import check_outputs, inputs_of
from trimcli.files.tensors import dtype_name, nonzero
from trimcli.images.pixels import classes_of, load_processor
from trimcli.images.sources import pictures
from trimcli.kernels.bitmap.model import sparsify
from trimcli.kernels.forms import pruned_names
from trimcli.memory import PeakMemory
from trimcli.model.pixels import channels
from trimcli.model.skeleton import Skeleton, open_model
from trimcli.pipeline.estimate import whole_model
from trimcli.pipeline.fit import Fit, Work, fit
from trimcli.pipeline.proof import prove
from trimcli.pipeline.walk import default_seqlen, max_positions
from trimcli.text.tokens import EvaluationText, evaluation_windows, load_tokenizer
from trimcli.world import World, joined, ranks


def evaluate(
    model: str,
    options: EvaluateOptions,
    output: Path | None = None,
    *,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
    announce: Callable[[Fit], None] | None = None,
) -> dict[str, Any]:
    """Measure a model, or it under masks; returns the document (`trim.results/1`) that `output` receives, if given.

    announce: is given how perplexity will keep to memory. Raises ResourceError where it could not within the limits.
    """
    options.check()
    if options.tasks and ranks() > 1:
        raise OptionError(f"--tasks is measured in one process and {ranks()} ranks were started; leave out torchrun.")
    inputs = inputs_of(options, model)
    check_outputs(inputs, texts=[output], folders=[options.log_samples], force=force)
    with joined() as world:
        return _evaluated(model, options, output, world, progress, force, announce)


def _evaluated(
    model: str,
    options: EvaluateOptions,
    output: Path | None,
    world: World,
    progress: Progress,
    force: bool,
    announce: Callable[[Fit], None] | None,
) -> dict[str, Any]:
    started = time.monotonic()
    with PeakMemory() as memory:
        skeleton = open_model(model, options, images=options.images is not None)
        mask = open_masks(options.masks, skeleton) if options.masks else None
        measured: dict[str, Any] = {"perplexity": []}
        texts: list[EvaluationText] = []
        if options.images is None:
            tokenizer = load_tokenizer(skeleton.checkpoint.directory, trust_remote_code=options.trust_remote_code)
            texts = _texts(skeleton, tokenizer, options)
        if options.tasks:
            _refuse_whole(skeleton, options)
        kept = _kept_in_memory(skeleton, texts, options)
        if kept is not None and announce:
            announce(kept)
        prove(skeleton, options.cache_dir, progress)
        if kept is not None:
            kept.hold(skeleton)
        if options.images is not None:
            measured["images"] = [_accuracy(skeleton, options.images, mask, options, progress)]
        sparse = sparsify(skeleton, mask, options.cache_dir, progress) if options.sparse else None
        if options.ppl:
            measured["perplexity"] = _perplexities(skeleton, texts, mask, options, progress)
        sparsity = world.agreed(lambda: _sparsity(skeleton, mask))
        if options.tasks:
            measured |= _tasks(skeleton, tokenizer, mask, options, progress, force)
    peak = world.most(memory.document())

    def finished() -> dict[str, Any]:
        name = Path(skeleton.checkpoint.id).name or skeleton.checkpoint.id
        document = manifest(
            RESULTS,
            "eval",
            options.document(),
            skeleton.fingerprint,
            {"masks": options.masks},
            label=f"{name} + {mask.path.stem}" if mask else name,
            **measured,
            sparsity=sparsity,
            pruning=_pruning(skeleton, mask),
            multiplied_sparse=None if sparse is None else len(sparse.names),
            compute_dtype=dtype_name(skeleton.dtype),
            device=str(skeleton.device),
            seconds=time.monotonic() - started,
            peak_memory=peak,
            planned=None if kept is None else kept.document(),
        )
        if output is not None:
            write_json(output, document, force=force)
        return document

    return world.agreed(finished)


def open_masks(path: Path, skeleton: Skeleton) -> MaskFile:
    """The masks file, checked to fit the model. Raises MismatchError also where masks alone do not carry the result."""
    mask = MaskFile.open(path)
    check_masks(mask.manifest, skeleton.fingerprint, path)
    if mask.manifest.get("changes_weights"):
        why = "belongs to a prune that changed the kept weights too, so masks alone do not carry its result"
        raise MismatchError(f"{path} {why}; measure the directory that prune --save-model wrote.")
    return mask


def _accuracy(
    skeleton: Skeleton, path: Path, mask: MaskFile | None, options: EvaluateOptions, progress: Progress
) -> dict[str, Any]:
    directory, config = skeleton.checkpoint.directory, skeleton.config
    processor = load_processor(directory, channels(config), trust_remote_code=options.trust_remote_code)
    with pictures(path) as found:
        how: dict[str, Any] = {"mask": mask, "batch_size": options.batch_size, "progress": progress}
        right = accuracy(skeleton, found, classes_of(found, config), processor, **how)
    return {"dataset": str(path), **asdict(right), "dtype": dtype_name(skeleton.dtype)}


def _texts(skeleton: Skeleton, tokenizer: Any, options: EvaluateOptions) -> list[EvaluationText]:
    """The windows of every text. Raises OptionError for more tokens than the model has positions."""
    seqlen = options.seqlen or default_seqlen(skeleton.config)
    positions = max_positions(skeleton.config)
    if positions is not None and seqlen > positions:
        known = f"the {positions} positions of {skeleton.checkpoint.id}"
        raise OptionError(f"--seqlen {seqlen} is beyond {known}; give less.")
    how: dict[str, Any] = {"seqlen": seqlen, "max_windows": options.max_windows}
    how |= {"bos": options.bos, "chat": options.chat}
    return [evaluation_windows(name, tokenizer, **how) for name in options.ppl]


def _kept_in_memory(skeleton: Skeleton, texts: Sequence[EvaluationText], options: EvaluateOptions) -> Fit | None:
    """How the pictures or the longest text keep to memory, None where there are none."""
    shapes = [text.windows.shape for text in texts]
    how: dict[str, Any] = {"spill": options.spill, "otherwise": spill_folder(options.cache_dir)}
    how["batch_size"] = options.batch_size
    if options.images is not None:
        with pictures(options.images) as found:
            return keep_pictures_in_memory(skeleton, len(found), **how)
    return keep_in_memory(skeleton, *max(shapes), **how) if shapes else None


def _refuse_whole(skeleton: Skeleton, options: EvaluateOptions) -> None:
    """Raise ResourceError where the limits do not hold the whole model, which zero-shot tasks are measured on."""
    words = f"measuring zero-shot tasks, for which all of {skeleton.checkpoint.id} is in memory,"
    fit(skeleton, Work(words, lambda *_: whole_model(skeleton, default_seqlen(skeleton.config)), 1, 1, 1))


def _perplexities(
    skeleton: Skeleton,
    texts: Sequence[EvaluationText],
    mask: MaskFile | None,
    options: EvaluateOptions,
    progress: Progress,
) -> list[dict[str, Any]]:
    batch_size = options.batch_size
    values = [perplexity(skeleton, text.windows, mask=mask, batch_size=batch_size, progress=progress) for text in texts]
    if any(map(math.isnan, values)):
        what = f"the head of {skeleton.checkpoint.directory} gives NaN (it holds such values or overflows)"
        raise InputError(f"{what}; try --dtype float32, or another checkpoint.")
    return [
        {
            "dataset": text.dataset,
            "value": value,
            "seqlen": text.windows.shape[1],
            "windows": len(text.windows),
            "tokens": text.tokens,
            "bos": text.bos,
            "dtype": dtype_name(skeleton.dtype),
        }
        for text, value in zip(texts, values, strict=True)
    ]


def _sparsity(skeleton: Skeleton, mask: MaskFile | None) -> dict[str, Any]:
    """Zeros read from the weights: `total` fraction over the linears, `zeros`, `weights`, and per linear.

    Of what lies outside of the layers those count that masks or `trim.json` name.
    """
    zeros = {}
    matrices = skeleton.matrices((pruned_names(skeleton.checkpoint) or ()) if mask is None else mask.names)
    for name, linear in matrices.items():
        stays = nonzero(linear.read(skeleton.checkpoint)).numpy()
        if mask is not None and name in mask.names:
            stays &= mask.keep(name).numpy()
        zeros[name] = stays.size - int(np.count_nonzero(stays))
    weights = sum(linear.numel for linear in matrices.values())
    return {
        "total": sum(zeros.values()) / weights if weights else 0.0,
        "zeros": sum(zeros.values()),
        "weights": weights,
        "linears": {name: zeros[name] / linear.numel for name, linear in matrices.items()},
    }


def _tasks(
    skeleton: Skeleton, tokenizer: Any, mask: MaskFile | None, options: EvaluateOptions, progress: Progress, force: bool
) -> dict[str, Any]:
    """The zero-shot part of the document, measured on the skeleton filled in place: the model is in memory once."""
    from trimcli.evaluation.zeroshot import ZeroShotOptions, evaluate_tasks

    skeleton.load_everything()
    if mask is not None:
        apply_masks(skeleton, mask)
    shared = {name: getattr(options, name) for name in ("tasks", "include_path", "num_fewshot", "limit", "log_samples")}
    asked = ZeroShotOptions(**shared, batch_size=options.batch_size or 8, seed=options.fewshot_seed, force=force)
    return evaluate_tasks(skeleton.model, tokenizer, asked, progress)


def _pruning(skeleton: Skeleton, mask: MaskFile | None) -> dict[str, Any] | None:
    """How the measured model was pruned, as the masks or the directory tell; None for a dense one."""
    found: dict[str, Any] = {}
    with contextlib.suppress(InputError):
        found = mask.manifest if mask else read_mark(skeleton.checkpoint.directory)
    return {key: value for key, value in found.items() if key != "linears"} or None
