"""Prune large language models to extreme sparsity, and say honestly what that cost.

The stages as functions, each of which a command of `trim` calls:

    calibrate, allocate, prune, apply_masks, finetune, evaluate, generate, unpack, verify

with their options (CalibrateOptions, AllocateOptions, PruneOptions with a Recipe, ...); `load_sparse` for a model that
holds and multiplies its pruned matrices packed; `load_packed` and `load_exported` for what is not an ordinary
directory. Importing this package imports no torch; the names load on first use.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "commands.allocate": ("allocate",),
    "commands.apply": ("apply_masks",),
    "commands.calibrate": ("calibrate",),
    "commands.evaluate": ("evaluate",),
    "commands.finetune": ("finetune",),
    "commands.generate": ("generate", "load_sparse"),
    "commands.options": (
        "AllocateOptions",
        "ApplyOptions",
        "CalibrateOptions",
        "EvaluateOptions",
        "GenerateOptions",
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
    "training.options": ("FinetuneOptions",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'trimcli' has no attribute {name!r}")
    found = getattr(import_module(f"trimcli.{_HOME_OF[name]}"), name)
    globals()[name] = found
    return found
