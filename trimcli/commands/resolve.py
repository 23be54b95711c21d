"""Options into what pruning works on: targets, and the files of earlier stages, made once where none are given."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from trimcli.commands.allocate import allocate
from trimcli.commands.calibrate import calibrate, encoder_of
from trimcli.commands.options import AllocateOptions, CalibrateOptions, PruneOptions
from trimcli.console import Progress
from trimcli.files.atomic import file_digest
from trimcli.files.cache import Cache
from trimcli.files.ratios import LayerSparsity
from trimcli.methods.choice import Target, uniform_target
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton
from trimcli.options import FOLDERS
from trimcli.text.stdin import file_of


def cached_calibration(skeleton: Skeleton, options: CalibrateOptions, progress: Progress) -> Path:
    """The calibration file of these options for this model, made if the cache lacks it."""
    options.check()
    key = _key(skeleton, options.document())
    key |= _digests(options, "dataset", "tokens")
    # The device and its dtype leave their mark on the statistics; the batch size does not.
    key["compute"] = [skeleton.device.type, str(skeleton.dtype)]
    for other in ("batch_size", "bos", "chat"):
        key["options"].pop(other)
    if options.tokens is None:
        key["encoding"] = encoder_of(skeleton, options).document()
    make = partial(calibrate, skeleton.checkpoint.id, options=options, progress=progress)
    return Cache(options.cache_dir).made("calibration", key, ".safetensors", make)


def cached_ratios(skeleton: Skeleton, options: AllocateOptions, cache_dir: Path | None, progress: Progress) -> Path:
    """The layer ratios file of these options for this model, made if the cache lacks it."""
    key = _key(skeleton, asdict(options))
    for field, found in _digests(options, "calibration", "import_file").items():
        key[field] = found
        key["options"].pop(field)
    key["options"].pop("metrics_cache", None)
    make = partial(allocate, skeleton.checkpoint.id, options=options, progress=progress)
    return Cache(cache_dir).made("ratios", key, ".json", make)


def targets_of(
    skeleton: Skeleton, linears: Sequence[Matrix], options: PruneOptions, ratios: LayerSparsity | None
) -> dict[str, Target]:
    """Full module name -> what the linear is to lose. Raises MismatchError (ratios of another model), OptionError."""
    if ratios is None:
        return dict.fromkeys((one.name for one in linears), uniform_target(options.sparsity, options.sparsity_type))
    ratios.check(skeleton.shapes, skeleton.fingerprint, {linear.name for linear in linears})
    pattern = ratios.pattern or {}
    options.recipe.check(pattern=bool(pattern))
    return {one.name: Target(ratios.sparsity[one.name], pattern.get(one.name)) for one in linears}


def spill_folder(cache_dir: Path | None) -> Path:
    """Where hidden states go that memory has no room for, and nobody said where."""
    return Cache(cache_dir).directory / "spilled"


def _digests(options: Any, *fields: str) -> dict[str, str]:
    """Of the files that these options name."""
    named = {field: file_of(value) for field in fields if (value := getattr(options, field)) is not None}
    return {field: file_digest(path) for field, path in named.items() if path.is_file()}


def _key(skeleton: Skeleton, options: dict[str, Any]) -> dict[str, Any]:
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    for folder in FOLDERS:
        plain.pop(folder, None)
    fingerprint = skeleton.fingerprint
    return {"model": [fingerprint.structure, fingerprint.content], "options": plain}
