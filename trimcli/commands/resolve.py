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
from trimcli.errors import InputError, OptionError
from trimcli.files.atomic import file_digest
from trimcli.files.cache import Cache
from trimcli.files.ratios import LayerSparsity
from trimcli.methods.choice import Target, uniform_target
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton, refuse_other_kind
from trimcli.options import UNRECORDED
from trimcli.pipeline.selection import chosen_matrices, refuse_outside
from trimcli.text.stdin import file_of


def cached_calibration(skeleton: Skeleton, options: CalibrateOptions, progress: Progress) -> Path:
    """The calibration file of these options for this model, made if the cache lacks it."""
    options.check()
    key = _key(skeleton, options.document())
    key |= _digests(options, "dataset", "tokens", "images")
    if options.images is not None and options.images.is_dir():
        key["pictures"] = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(options.images)]
    # The device and its dtype leave their mark on the statistics; the batch size does not.
    key["compute"] = [skeleton.device.type, str(skeleton.dtype)]
    for other in ("batch_size", "bos", "chat"):
        key["options"].pop(other)
    if options.tokens is None and options.images is None:
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


def refuse_samples_of_other_kind(skeleton: Skeleton, options: PruneOptions) -> None:
    """Raise InputError where samples are asked for that the model does not take, OptionError for what is not its."""
    recipe, drawn = options.recipe, options.calibrate
    if drawn is not None and drawn.images is not None:
        refuse_other_kind(skeleton.checkpoint, images=True)
    if not skeleton.images:
        return
    allocation = options.allocate.method if options.allocate and options.allocate.trials else None
    wrong = {
        "--prune-barber": recipe.barber,
        f"--reconstruct {recipe.reconstruct}": recipe.reconstructs,
        "--refine learned": recipe.refine == "learned",
        f"--alloc {allocation}": allocation,
    }
    if flag := next((flag for flag, given in wrong.items() if given), None):
        raise OptionError(
            f"{flag} works on text, and {skeleton.checkpoint.id} is an image classifier; leave it out, or "
            f"replace it where a preset brings it, as by --alloc owl."
        )
    reads = (recipe.needs or (options.allocate and options.allocate.allocating.needs)) and options.calibration is None
    if reads and (drawn is None or drawn.images is None):
        what = f"{skeleton.checkpoint.id} is an image classifier, and --method {recipe.method} reads activations"
        raise OptionError(f"{what}; give pictures with --images, or --calibration.")


def matrices_of(skeleton: Skeleton, options: PruneOptions, progress: Progress) -> list[Matrix]:
    """The matrices that a prune is of. Raises OptionError for none, and for some that its recipe cannot prune."""
    found = chosen_matrices(skeleton, options.only, options.skip, progress)
    refuse_outside(skeleton, found, options.recipe, options.allocate.method if options.allocate else None)
    return found


def targets_of(
    skeleton: Skeleton, linears: Sequence[Matrix], options: PruneOptions, ratios: LayerSparsity | None
) -> dict[str, Target]:
    """Full module name -> what the linear is to lose. Raises MismatchError (ratios of another model), UsageError.

    What lies outside of the layers, of which ratios know nothing, is to lose the share that is to go on average.
    """
    if ratios is None:
        return dict.fromkeys((one.name for one in linears), uniform_target(options.sparsity, options.sparsity_type))
    outside = [one.name for one in linears if one.name in skeleton.outside]
    ratios.check(skeleton.shapes, skeleton.fingerprint, {one.name for one in linears if one.name not in outside})
    pattern = ratios.pattern or {}
    options.recipe.check(pattern=bool(pattern))
    if outside and pattern:
        what = f"{outside[0]} lies outside of the layers, whose N:M patterns alone {_named(ratios)} gives"
        raise OptionError(f"{what}; leave it out of --only, and prune it by itself with --sparsity-type.")
    if outside and not 0 <= ratios.target < 1:
        raise InputError(f"{_named(ratios)} gives the target {ratios.target}, outside [0, 1); make it anew.")
    shares = dict.fromkeys(outside, ratios.target) | ratios.sparsity
    return {one.name: Target(shares[one.name], pattern.get(one.name)) for one in linears}


def _named(ratios: LayerSparsity) -> str:
    return str(ratios.path or "the allocation")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digests(options: Any, *fields: str) -> dict[str, str]:
    """Of the files that these options name."""
    named = {field: file_of(value) for field in fields if (value := getattr(options, field)) is not None}
    return {field: file_digest(path) for field, path in named.items() if path.is_file()}


def _key(skeleton: Skeleton, options: dict[str, Any]) -> dict[str, Any]:
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    for name in UNRECORDED:
        plain.pop(name, None)
    fingerprint = skeleton.fingerprint
    return {"model": [fingerprint.structure, fingerprint.content], "options": plain}
