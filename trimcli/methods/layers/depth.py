"""Depth: later decoder layers lose more, in a straight line, whatever they hold."""

from __future__ import annotations

from dataclasses import dataclass

from trimcli.methods.layers.base import Allocation, Survey, layer_allocation, spread
from trimcli.options import check_fields, not_negative, option


@dataclass(frozen=True)
class DepthOptions:
    """How steep the line is. Raises OptionError for a value that cannot be used."""

    depth_width: float = option(
        0.1, "How far the first and the last layer lie from the target.", panel="Depth",
        check=not_negative,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)


@layer_allocation(
    "depth", title="depth", source="trim 2026, no paper: a line over the layers", options=DepthOptions, config_only=True
)
def depth(survey: Survey, target: float, options: DepthOptions) -> Allocation:
    """Earlier decoder layers keep more, in a straight line."""
    import torch

    layers = len(survey.layers)
    line = torch.linspace(-1, 1, layers, dtype=torch.float64) if layers > 1 else torch.zeros(1, dtype=torch.float64)
    sparsity = spread(survey, target + options.depth_width * line)
    return Allocation(target, sparsity, [None] * len(survey.names), {"depth_width": options.depth_width})
