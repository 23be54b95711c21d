"""Prune large language models to extreme sparsity, and say honestly what that cost.

The stages as functions, each of which a command of `trim` calls:

    calibrate, allocate, prune, apply_masks, evaluate

with their options (CalibrateOptions, AllocateOptions, PruneOptions with a Recipe, ApplyOptions, EvaluateOptions), and
`load_packed` and `load_exported` for what is not an ordinary
directory. Importing this package imports no torch; the names load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimcli.commands.allocate import AllocateOptions, allocate
    from trimcli.commands.apply import ApplyOptions, apply_masks
    from trimcli.commands.calibrate import CalibrateOptions, calibrate
    from trimcli.commands.evaluate import EvaluateOptions, evaluate
    from trimcli.commands.prune import PruneOptions, prune
    from trimcli.commands.unpack import load_packed, unpack
    from trimcli.commands.verify import VerifyOptions, verify
    from trimcli.errors import TrimError, UsageError
    from trimcli.kernels.exported import load_exported
    from trimcli.methods.blocks.barber import BarberOptions
    from trimcli.methods.recipe import Recipe
    from trimcli.methods.rows.search import RowOptions
    from trimcli.methods.updates.obs import UpdateOptions

_HOMES = {
    "AllocateOptions": "commands.allocate",
    "ApplyOptions": "commands.apply",
    "BarberOptions": "methods.blocks.barber",
    "CalibrateOptions": "commands.calibrate",
    "EvaluateOptions": "commands.evaluate",
    "PruneOptions": "commands.prune",
    "Recipe": "methods.recipe",
    "RowOptions": "methods.rows.search",
    "TrimError": "errors",
    "UpdateOptions": "methods.updates.obs",
    "UsageError": "errors",
    "VerifyOptions": "commands.verify",
    "allocate": "commands.allocate",
    "apply_masks": "commands.apply",
    "calibrate": "commands.calibrate",
    "evaluate": "commands.evaluate",
    "load_exported": "kernels.exported",
    "load_packed": "commands.unpack",
    "prune": "commands.prune",
    "unpack": "commands.unpack",
    "verify": "commands.verify",
}

__all__ = [
    "AllocateOptions",
    "ApplyOptions",
    "BarberOptions",
    "CalibrateOptions",
    "EvaluateOptions",
    "PruneOptions",
    "Recipe",
    "RowOptions",
    "TrimError",
    "UpdateOptions",
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
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'trimcli' has no attribute {name!r}")
    found = getattr(import_module(f"trimcli.{home}"), name)
    globals()[name] = found
    return found
