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
    from trimcli.barber import BarberOptions
    from trimcli.errors import TrimError, UsageError
    from trimcli.exported import load_exported
    from trimcli.recipe import Recipe
    from trimcli.rows import RowOptions
    from trimcli.sparsegpt import UpdateOptions
    from trimcli.stages.allocate import AllocateOptions, allocate
    from trimcli.stages.apply import ApplyOptions, apply_masks
    from trimcli.stages.calibrate import CalibrateOptions, calibrate
    from trimcli.stages.evaluate import EvaluateOptions, evaluate
    from trimcli.stages.prune import PruneOptions, prune
    from trimcli.stages.unpack import load_packed, unpack
    from trimcli.stages.verify import VerifyOptions, verify

_HOMES = {
    "AllocateOptions": "stages.allocate",
    "ApplyOptions": "stages.apply",
    "BarberOptions": "barber",
    "CalibrateOptions": "stages.calibrate",
    "EvaluateOptions": "stages.evaluate",
    "PruneOptions": "stages.prune",
    "Recipe": "recipe",
    "RowOptions": "rows",
    "TrimError": "errors",
    "UpdateOptions": "sparsegpt",
    "UsageError": "errors",
    "VerifyOptions": "stages.verify",
    "allocate": "stages.allocate",
    "apply_masks": "stages.apply",
    "calibrate": "stages.calibrate",
    "evaluate": "stages.evaluate",
    "load_exported": "exported",
    "load_packed": "stages.unpack",
    "prune": "stages.prune",
    "unpack": "stages.unpack",
    "verify": "stages.verify",
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
