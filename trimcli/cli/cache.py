"""`trim cache`."""

from typing import Annotated

from trimcli.cli.options import run_option, switch
from trimcli.cli.output import Say, rows_table, show, size


def cache(
    say: Say,
    clear: Annotated[bool, switch("--clear", "Remove everything it holds.")] = False,
    cache_dir: run_option("cache_dir") = None,  # type: ignore[valid-type]
) -> None:
    """Show what the stage cache holds: calibrations, ratios and the parts of unfinished runs; or clear it.

    Example: trim cache --clear
    """
    from trimcli.files.cache import Cache

    found = Cache(cache_dir)
    entries = found.entries()
    freed = found.clear() if clear else 0
    listed = [{"kind": entry.kind, "path": entry.path, "bytes": entry.nbytes} for entry in entries]

    def people() -> None:
        rows = [(entry.kind, size(entry.nbytes), entry.path.name) for entry in entries]
        if rows:
            show(rows_table(("kind", "size", "name"), rows, words=["name"]))
        show(f"{len(entries)} entries in {found.directory}" + (f", {size(freed)} freed" if clear else ""))

    say.result(lambda: {"directory": found.directory, "entries": listed, "freed": freed}, people)
