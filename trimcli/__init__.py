"""Prune large language models to extreme sparsity, and say honestly what that cost.

The stages as functions, each of which a command of `trim` calls:

    calibrate, allocate, prune, apply_masks, evaluate, unpack, verify

with their options (CalibrateOptions, AllocateOptions, PruneOptions with a Recipe, ...), and `load_packed` and
`load_exported` for what is not an ordinary directory. Importing this package imports no torch; the names load on
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimcli.commands.allocate import allocate
    from trimcli.commands.apply import apply_masks
    from trimcli.commands.calibrate import calibrate
    from trimcli.commands.evaluate import evaluate
    from trimcli.commands.options import (
        AllocateOptions,
        ApplyOptions,
        CalibrateOptions,
        EvaluateOptions,
        PruneOptions,
        VerifyOptions,
    )
    from trimcli.commands.prune import prune
    from trimcli.commands.unpack import load_packed, unpack
    from trimcli.commands.verify import verify
    from trimcli.errors import TrimError, UsageError
    from trimcli.kernels.exported import load_exported
    from trimcli.methods.blocks.options import BarberOptions
    from trimcli.methods.layers.alpha import AlphaOptions
    from trimcli.methods.layers.owl import OwlOptions
    from trimcli.methods.recipe import Recipe
    from trimcli.methods.rows.options import TrimOptions
    from trimcli.methods.updates.obs import ObsOptions

_HOMES = {
    "commands.allocate": ("allocate",),
    "commands.apply": ("apply_masks",),
    "commands.calibrate": ("calibrate",),
    "commands.evaluate": ("evaluate",),
    "commands.options": (
        "AllocateOptions",
        "ApplyOptions",
        "CalibrateOptions",
        "EvaluateOptions",
        "PruneOptions",
        "VerifyOptions",
    ),
    "commands.prune": ("prune",),
    "commands.unpack": ("load_packed", "unpack"),
    "commands.verify": ("verify",),
    "errors": ("TrimError", "UsageError"),
    "kernels.exported": ("load_exported",),
    "methods.blocks.options": ("BarberOptions",),
    "methods.layers.alpha": ("AlphaOptions",),
    "methods.layers.owl": ("OwlOptions",),
    "methods.recipe": ("Recipe",),
    "methods.rows.options": ("TrimOptions",),
    "methods.updates.obs": ("ObsOptions",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AllocateOptions",
    "AlphaOptions",
    "ApplyOptions",
    "BarberOptions",
    "CalibrateOptions",
    "EvaluateOptions",
    "ObsOptions",
    "OwlOptions",
    "PruneOptions",
    "Recipe",
    "TrimError",
    "TrimOptions",
    "UsageError",
    "VerifyOptions",
    "allocate",
    "apply_masks",
    "calibrate",
    "evaluate",
    "load_exported",
    "load_packed",
    "prune",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'trimcli' has no attribute {name!r}")
    found = getattr(import_module(f"trimcli.{home}"), name)
    globals()[name] = found
    return found
