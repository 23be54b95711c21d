"""The stages before pruning, when no files of theirs are given: run once, then taken from the stage cache."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trimcli.commands.allocate import AllocateOptions, allocate
from trimcli.commands.calibrate import CalibrateOptions, calibrate
from trimcli.console import Progress
from trimcli.files.atomic import file_digest
from trimcli.files.cache import Cache
from trimcli.model.skeleton import Skeleton


def cached_calibration(skeleton: Skeleton, options: CalibrateOptions, progress: Progress) -> Path:
    """The calibration file of these options for this model, made if the cache lacks it."""
    options.check()
    key = _key(skeleton, options.document())
    for field in ("dataset", "tokens"):
        named = getattr(options, field)
        if named is not None and Path(named).is_file():
            key[field] = file_digest(Path(named))
    # The device and its dtype leave their mark on the statistics; the batch size does not.
    key["compute"] = [skeleton.device.type, str(skeleton.dtype)]
    key["options"].pop("batch_size")
    path = Cache(options.cache_dir).file("calibration", key, ".safetensors")
    if not path.is_file():
        calibrate(skeleton.checkpoint.id, path, options, progress=progress)
    return path


def cached_ratios(skeleton: Skeleton, options: AllocateOptions, cache_dir: Path | None, progress: Progress) -> Path:
    """The layer ratios file of these options for this model, made if the cache lacks it."""
    key = _key(skeleton, asdict(options))
    for field in ("calibration", "import_file"):
        named = getattr(options, field)
        if named is not None and Path(named).is_file():
            key[field] = file_digest(Path(named))
            key["options"].pop(field)
    key["options"].pop("metrics_cache", None)
    path = Cache(cache_dir).file("ratios", key, ".json")
    if not path.is_file():
        allocate(skeleton.checkpoint.id, path, options, progress=progress)
    return path


def with_stats(options: CalibrateOptions, *stats: str) -> CalibrateOptions:
    """The same calibration with other statistics."""
    return replace(options, stats=stats)


def _key(skeleton: Skeleton, options: dict[str, Any]) -> dict[str, Any]:
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    plain.pop("cache_dir", None)
    fingerprint = skeleton.fingerprint
    return {"model": [fingerprint.structure, fingerprint.content], "options": plain}
