"""`trim cache`."""

from typing import Annotated

import typer

from trimcli.cli import common
from trimcli.cli.common import boundary


@boundary
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove everything it holds.")] = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
    cache_dir: common.CacheDir = None,
) -> None:
    """Show what the stage cache holds: calibrations, ratios and the parts of unfinished runs; or clear it.

    Example: trim cache --clear
    """
    common.start(quiet, as_json)
    from trimcli.files.cache import Cache

    found = Cache(cache_dir)
    entries = found.entries()
    freed = found.clear() if clear else 0
    if as_json:
        listed = [{"kind": entry.kind, "path": entry.path, "bytes": entry.nbytes} for entry in entries]
        common.emit_json({"directory": found.directory, "entries": listed, "freed": freed})
    elif not quiet:
        from trimcli.cli.tables import rows_table

        rows = [(entry.kind, common.size(entry.nbytes), entry.path.name) for entry in entries]
        if rows:
            common.show(rows_table((("kind", "left"), ("size", "right"), ("name", "left")), rows))
        common.show(f"{len(entries)} entries in {found.directory}" + (f", {common.size(freed)} freed" if clear else ""))
