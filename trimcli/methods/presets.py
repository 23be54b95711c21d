"""Presets: whole recipes by one word, from the published method to the least damage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A recipe by its fields that differ from the defaults. alloc: a layer allocation, where the target has none.

    help, source: as an entry's. unstructured: fields that do not go with an N:M pattern, which fixes every count.
    """

    help: str
    source: str
    recipe: Mapping[str, Any]
    unstructured: Mapping[str, Any]
    alloc: str | None = None

    def fields(self, *, pattern: bool) -> dict[str, Any]:
        """The recipe's fields, for a target that is an N:M pattern or not."""
        return {**self.recipe, **({} if pattern else self.unstructured)}


PRESETS: Mapping[str, Preset] = {
    "reference": Preset(
        "SparseGPT as it was published", "Frantar & Alistarh 2023", {"method": "sparsegpt", "numerics": "reference"}, {}
    ),
    "fast": Preset(
        "wanda's mask, then the best kept weights under it", "README, Measured", {"update": "cg"}, {"rows": "free"}
    ),
    "balanced": Preset(
        "mask and kept weights of every matrix together, layers as alloc-layers --method auto finds",
        "README, Measured",
        {"method": "admm"},
        {"rows": "free"},
        "auto",
    ),
    "best": Preset(
        "the same, then every layer trained towards the dense one's outputs",
        "README, Measured",
        {"method": "admm", "reconstruct": "layer"},
        {"rows": "free"},
        "auto",
    ),
}
