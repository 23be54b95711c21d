"""Outputs of every kind, written atomically, and what a folder holds of them; without torch, so that it is quick."""

from collections.abc import Callable
from pathlib import Path

from trimcli.files.atomic import MARK, atomic_directory, atomic_file

OLD, NEW = "old", "new"


def contents(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory, hidden files too: a file's bytes, None for a directory."""
    found = sorted(directory.rglob("*"))
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in found}


def write_file(target: Path, text: str = NEW) -> None:
    with atomic_file(target, force=True) as temporary:
        temporary.write_text(text)


def write_directory(target: Path, text: str = NEW) -> None:
    """A directory as commands write it: `trim.json` in it is written atomically itself."""
    with atomic_directory(target, force=True) as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / text).write_text(text)
        write_file(temporary / MARK, text)
        assert (temporary / MARK).read_text() == text


DIRECTORIES = ("pruned", "rows")
WRITERS: dict[str, Callable[[Path, str], None]] = {
    "masks": write_file,
    "pruned": write_directory,
    "rows.json": write_file,
    "rows": write_directory,
}


def expected(*names: str) -> dict[str, bytes | None]:
    """What a folder contains once the outputs of these names have been written with `NEW`."""
    whole = NEW.encode()
    directory = {"": None, "/below": None, f"/below/{NEW}": whole, f"/{MARK}": whole}
    forms = {name: directory if name in DIRECTORIES else {"": whole} for name in names}
    return {name + path: data for name, form in forms.items() for path, data in form.items()}


def write_all(folder: Path, text: str, *, but: tuple[str, ...] = ()) -> None:
    for name, write in WRITERS.items():
        if name not in but:
            write(folder / name, text)
