"""What a command refuses of its outputs before any work: what is lost by writing them, or cannot be written."""

import contextlib
import dataclasses
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trimcli.console import size
from trimcli.errors import InputError, OptionError, ResourceError, TrimError
from trimcli.files.atomic import MARK, can_stage, place_of, refuse_existing, refuse_kind
from trimcli.files.checkpoint import BIN_INDEX, BIN_SINGLE, SAFE_INDEX, SAFE_SINGLE
from trimcli.files.documents import is_stdout, is_stream, read_json
from trimcli.files.tensors import read_manifest

# Fields of options classes: the paths that are written, and the texts that may be paths and are read.
WRITTEN = {"save_model", "stats_out", "metrics_cache", "log_samples", "spill"}
READ = {"dataset", "ppl", "tasks", "teacher"}
# Beside other weights, these would be taken for the model.
TAKEN = {MARK, "config.json", SAFE_SINGLE, SAFE_INDEX, BIN_SINGLE, BIN_INDEX}


def inputs_of(options: Any, *given: str | Path) -> list[Path]:
    """`given`, and what an options object names to be read, its stages' and methods' options included."""
    return [*map(Path, given), *_read_by(options)]


def _read_by(options: Any) -> Iterator[Path]:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if str(part) == "-":  # standard input
                continue
            if dataclasses.is_dataclass(part):
                yield from _read_by(part)
            elif isinstance(part, Path) and field.name not in WRITTEN:
                yield part
            elif isinstance(part, str) and field.name in READ:
                yield Path(part)


def check_outputs(
    inputs: Iterable[Path],
    *,
    files: Iterable[Path | None] = (),
    texts: Iterable[Path | None] = (),
    directories: Iterable[Path | None] = (),
    kept: Iterable[Path | None] = (),
    folders: Iterable[Path | None] = (),
    force: bool = False,
) -> None:
    """Refuse outputs that are inputs, meet each other, may not be replaced or cannot be written. None is no output.

    texts: files that may be streams. kept: files that are read and extended. folders: those that files are added to.
    Raises OptionError, InputError, OutputExists; OSError for a full disk.
    """
    named = [(target, kind) for kind, group in (("file", files), ("text", texts), ("directory", directories),
             ("kept", kept), ("folder", folders)) for target in group if target is not None]  # fmt: skip
    sources = [path for given in inputs if _exists(path := given.expanduser())]
    places: list[Path] = []
    for target, kind in named:
        if is_stdout(target) or (kind == "text" and is_stream(target)):
            if kind != "text":
                what = f"{target} is standard output, which takes JSON and reports alone"
                raise OptionError(f"{what}; name a {'file' if kind in ('file', 'kept') else 'directory'}.")
            continue
        if not target.name:
            raise OptionError(f"the output '{target}' is a folder without a name of its own; name a file or directory.")
        place = place_of(target)
        for source in sources:
            _refuse_input(target, place, source, folder=kind == "folder")
        place = place.resolve()
        if any(place.is_relative_to(other) or other.is_relative_to(place) for other in places):
            raise OptionError(f"the run would write two outputs to {target}, or one inside the other; name another.")
        places.append(place)
        if kind == "folder" and place.is_dir():
            place = place / "samples"
        else:
            refuse_existing(target, force=force or kind == "kept")
            refuse_kind(target, directory=kind in ("directory", "folder"))
        _refuse_unwritable(target, place)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a text that is no path
        return False


def _refuse_input(target: Path, place: Path, source: Path, *, folder: bool) -> None:
    """Raise OptionError where writing `place` would lose `source`, or a file in it. folder: files are added to it."""
    there, place = source.resolve(), place.resolve()
    if place == there or (place.exists() and place.samefile(there)):
        raise OptionError(f"the output {target} is {source} itself, which the run reads; name another output.")
    if there.is_relative_to(place) and (not folder or (there.parent == place and there.suffix == ".jsonl")):
        raise OptionError(f"the output {target} would replace {source}, which the run reads; name another output.")
    inside = place.is_relative_to(there) and not place.is_dir() and _belongs(place, there)
    links = there.iterdir() if there.is_dir() and place.is_file() else ()
    if there.is_dir() and (inside or any(child.is_symlink() and child.resolve() == place for child in links)):
        raise OptionError(f"the output {target} is a file of {source}, which the run reads; name another output.")


def _belongs(path: Path, folder: Path) -> bool:
    """Whether a file in `folder` is, or would be taken for, a part of it: not what trim wrote there by itself."""
    if path.parent == folder and path.name in TAKEN:
        return True
    if not path.is_file():  # a pipe would wait to be written
        return False
    with contextlib.suppress(TrimError, OSError):
        document = read_json(path) if path.suffix == ".json" else read_manifest(path)
        return not re.match(r"trim\.(?!export/)", str(document.get("schema")))  # exports have it in their shards
    return True


def _refuse_unwritable(target: Path, place: Path) -> None:
    try:
        can_stage(place)
    except FileExistsError:  # staged by a run that is at work: so it can be
        pass
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f"{target} cannot be written in {place.parent} ({problem.strerror})"
        raise InputError(f"{what}; choose another place or change its rights.") from None


def check_space(needed: Mapping[Path, int]) -> None:
    """Raise ResourceError unless there is room for so many bytes of each output, old ones staying till they stand."""
    disks: dict[int, int] = {}
    for target, nbytes in needed.items():
        folder = place_of(target).parent
        device = os.stat(folder).st_dev
        disks[device] = disks.get(device, 0) + nbytes
        if disks[device] > (free := shutil.disk_usage(folder).free):
            what = f"the disk of {target} has {size(free)} free, and {size(disks[device])} are to be written to it"
            raise ResourceError(f"{what}; free space or name an output on another disk.")
