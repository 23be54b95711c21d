"""The eval stage: perplexity layer by layer, zero-shot tasks through lm-eval, and the sparsity that was there."""

import time
from pathlib import Path
from typing import Any

from trimcli.commands.options import EvaluateOptions
from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError, MismatchError, OptionError
from trimcli.evaluation.perplexity import apply_masks_to_layer, perplexity
from trimcli.files.atomic import MARK, refuse_existing
from trimcli.files.documents import read_json, write_json
from trimcli.files.manifest import RESULTS, check_model, manifest
from trimcli.files.masks import MaskFile
from trimcli.files.tensors import dtype_name
from trimcli.memory import PeakMemory
from trimcli.model.skeleton import Skeleton, open_model
from trimcli.pipeline.walk import default_seqlen, max_positions
from trimcli.text.tokens import evaluation_windows, load_tokenizer


def evaluate(
    model: str,
    options: EvaluateOptions,
    output: Path | None = None,
    *,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Measure a model directory (dense, pruned or packed), or a model under masks.

    Returns the results document (`trim.results/1`), which is also written to `output` if given: `perplexity`, `tasks`,
    `sparsity`, `seconds`, `peak_memory` and provenance. The measured directory is left untouched.
    """
    options.check()
    if output is not None:
        refuse_existing(output, force=force)
    started = time.monotonic()
    with PeakMemory() as memory:
        skeleton = open_model(model, options)
        mask = open_masks(options.masks, skeleton) if options.masks else None
        tokenizer = load_tokenizer(skeleton.checkpoint.directory, trust_remote_code=options.trust_remote_code)
        measured = _perplexities(skeleton, tokenizer, mask, options, progress)
        sparsity = measured_sparsity(skeleton, mask)
        tasks = _tasks(skeleton, tokenizer, mask, options, progress, force=force) if options.tasks else {}
    document = manifest(
        RESULTS,
        "eval",
        options.document(),
        skeleton.fingerprint,
        {"masks": options.masks} if options.masks else None,
        label=label_of(skeleton, mask),
        perplexity=measured,
        **tasks,
        sparsity=sparsity,
        pruning=_pruning(skeleton, mask),
        compute_dtype=dtype_name(skeleton.dtype),
        device=str(skeleton.device),
        seconds=time.monotonic() - started,
        peak_memory=memory.document(),
    )
    if output is not None:
        write_json(output, document, force=force)
    return document


def open_masks(path: Path, skeleton: Skeleton) -> MaskFile:
    """The masks file, checked to fit the model. Raises MismatchError also where masks alone do not carry the result."""
    mask = MaskFile.open(path)
    check_model(mask.manifest, skeleton.fingerprint, path)
    if mask.manifest.get("changes_weights"):
        raise MismatchError(
            f"{path} belongs to a prune that changed the kept weights too, so masks alone do not carry its result; "
            "measure the directory that prune --save-model wrote."
        )
    return mask


def _perplexities(
    skeleton: Skeleton, tokenizer: Any, mask: MaskFile | None, options: EvaluateOptions, progress: Progress
) -> list[dict[str, Any]]:
    seqlen = options.seqlen or default_seqlen(skeleton.config)
    positions = max_positions(skeleton.config)
    if positions is not None and seqlen > positions:
        raise OptionError(
            f"--seqlen {seqlen} is beyond the {positions} positions of {skeleton.checkpoint.id}; give less."
        )
    texts = [
        evaluation_windows(dataset, tokenizer, seqlen=seqlen, max_windows=options.max_windows)
        for dataset in options.ppl
    ]
    return [
        {
            "dataset": text.dataset,
            "value": perplexity(skeleton, text.windows, mask=mask, batch_size=options.batch_size, progress=progress),
            "seqlen": seqlen,
            "windows": len(text.windows),
            "tokens": text.tokens,
            "dtype": dtype_name(skeleton.dtype),
        }
        for text in texts
    ]


def measured_sparsity(skeleton: Skeleton, mask: MaskFile | None = None) -> dict[str, Any]:
    """Zeros read from the weights: `total` fraction over the linears, `zeros`, `weights`, and per linear."""
    masked = set(mask.names) if mask else set()
    zeros = {}
    for name, linear in skeleton.linears.items():
        stays = linear.read(skeleton.checkpoint) != 0
        if mask is not None and name in masked:
            stays = stays & mask.keep(name)
        zeros[name] = stays.numel() - int(stays.count_nonzero())
    weights = sum(linear.numel for linear in skeleton.linears.values())
    return {
        "total": sum(zeros.values()) / weights if weights else 0.0,
        "zeros": sum(zeros.values()),
        "weights": weights,
        "linears": {name: zeros[name] / linear.numel for name, linear in skeleton.linears.items()},
    }


def _tasks(
    skeleton: Skeleton,
    tokenizer: Any,
    mask: MaskFile | None,
    options: EvaluateOptions,
    progress: Progress,
    *,
    force: bool,
) -> dict[str, Any]:
    from trimcli.evaluation.zeroshot import ZeroShotOptions, evaluate_tasks

    whole = load_whole(skeleton, mask)
    asked = ZeroShotOptions(
        tasks=options.tasks,
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=options.batch_size or 8,
        log_samples=options.log_samples,
        seed=options.fewshot_seed,
        force=force,
    )
    return evaluate_tasks(whole, tokenizer, asked, progress)


def load_whole(skeleton: Skeleton, mask: MaskFile | None = None) -> Any:
    """The skeleton's transformers model with all its weights in memory, masked if asked to: what lm-eval needs.

    The skeleton is filled in place, so a model is in memory once. Dense, pruned and packed directories alike.
    """
    skeleton.load_everything()
    if mask is not None:
        for layer in skeleton.layers:
            apply_masks_to_layer(layer, mask)
    return skeleton.model


def label_of(skeleton: Skeleton, mask: MaskFile | None) -> str:
    """A short name for the run: the model's, and the masks' or the pruning's."""
    name = Path(skeleton.checkpoint.id).name or skeleton.checkpoint.id
    return f"{name} + {mask.path.stem}" if mask else name


def _pruning(skeleton: Skeleton, mask: MaskFile | None) -> dict[str, Any] | None:
    """How the measured model was pruned, as the masks or the directory tell; None for a dense one."""
    if mask is not None:
        return {key: value for key, value in mask.manifest.items() if key != "linears"}
    mark = skeleton.checkpoint.directory / MARK
    if not mark.is_file():
        return None
    try:
        return {key: value for key, value in read_json(mark).items() if key != "linears"}
    except InputError:
        return None
