"""`trim kernels`."""

from typing import Annotated

import typer

from trimcli.cli.options import run_option
from trimcli.cli.output import Say, facts
from trimcli.errors import OptionError


def kernels(
    action: Annotated[str, typer.Argument(metavar="build", help="build: compile the sparse products.")],
    say: Say,
    cache_dir: run_option("cache_dir") = None,  # type: ignore[valid-type]
) -> None:
    """Compile the sparse products ahead of use, with g++ and ninja, and keep them in the cache.

    Without, the first command that needs them does; copied with the cache folder, they serve machines of the same kind
    that have no compiler.

    Example: trim kernels build
    """
    if action != "build":
        raise OptionError(f"trim kernels {action!r} is none of build; did you mean 'build'?")
    from trimcli.kernels.bitmap.build import products

    path = products(cache_dir)
    say.result(lambda: {"library": path}, lambda: facts({"library": path}))
