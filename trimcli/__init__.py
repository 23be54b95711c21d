"""Prune large language models to extreme sparsity, and say honestly what that cost.

The stages as functions, each of which a command of `trim` calls:

    calibrate, allocate, prune, apply_masks, evaluate

with their options (CalibrateOptions, AllocateOptions, PruneOptions with a Recipe, ApplyOptions, EvaluateOptions), and
`load_packed` for packed directories. Importing this package imports no torch; the names load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimcli.allocate import AllocateOptions, allocate
    from trimcli.apply import ApplyOptions, apply_masks
    from trimcli.barber import BarberOptions
    from trimcli.calibrate import CalibrateOptions, calibrate
    from trimcli.errors import TrimError, UsageError
    from trimcli.evaluate import EvaluateOptions, evaluate
    from trimcli.prune import PruneOptions, prune
    from trimcli.recipe import Recipe
    from trimcli.rows import RowOptions
    from trimcli.sparsegpt import UpdateOptions
    from trimcli.unpack import load_packed, unpack
    from trimcli.verify import VerifyOptions, verify

_HOMES = {
    "AllocateOptions": "allocate",
    "ApplyOptions": "apply",
    "BarberOptions": "barber",
    "CalibrateOptions": "calibrate",
    "EvaluateOptions": "evaluate",
    "PruneOptions": "prune",
    "Recipe": "recipe",
    "RowOptions": "rows",
    "TrimError": "errors",
    "UpdateOptions": "sparsegpt",
    "UsageError": "errors",
    "VerifyOptions": "verify",
    "allocate": "allocate",
    "apply_masks": "apply",
    "calibrate": "calibrate",
    "evaluate": "evaluate",
    "load_packed": "unpack",
    "prune": "prune",
    "unpack": "unpack",
    "verify": "verify",
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
    # The submodule of the same name would shadow the function from here on.
    globals()[name] = found
    return found
