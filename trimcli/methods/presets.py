"""Presets: whole recipes by one word, from the published method to the least damage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimcli.methods.recipe import Recipe
from trimcli.methods.updates.cg import FitOptions


@dataclass(frozen=True)
class Preset:
    """What a word stands for. alloc: a layer allocation, where the target has none and is no N:M pattern.

    help, source: as an entry's. fields: of the Recipe, where they differ from its defaults. whole: those that an N:M
    pattern rules out, since it fixes every row's count.
    """

    help: str
    source: str
    fields: Mapping[str, Any]
    whole: Mapping[str, Any]
    alloc: str | None = None

    def chosen(self, *, pattern: bool) -> dict[str, Any]:
        """The recipe's fields, for a target that is an N:M pattern or not."""
        return {**self.fields, **({} if pattern else self.whole)}

    def recipe(self, *, pattern: bool = False) -> Recipe:
        """The recipe."""
        return Recipe(**self.chosen(pattern=pattern))


PRESETS: Mapping[str, Preset] = {
    "reference": Preset(
        "SparseGPT as it was published", "Frantar & Alistarh 2023", {"method": "sparsegpt", "numerics": "reference"}, {}
    ),
    "fast": Preset(
        "mask and kept weights of every matrix together, in few steps",
        "benchmarks/QUALITY.md",
        {"method": "admm", "options": (FitOptions(cg_steps=10, admm_steps=15),)},
        {"rows": "free"},
    ),
    "balanced": Preset(
        "the same in more steps, layers as alloc-layers --method auto finds them",
        "benchmarks/QUALITY.md",
        {"method": "admm"},
        {"rows": "free"},
        "auto",
    ),
    "best": Preset(
        "the same, layers by --method search, and every layer trained towards the dense one's outputs",
        "benchmarks/QUALITY.md",
        {"method": "admm", "reconstruct": "layer", "reconstruct_steps": 512},
        {"rows": "free"},
        "search",
    ),
}
