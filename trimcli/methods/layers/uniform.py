"""Uniform layers: everything gets the target."""

from __future__ import annotations

from trimcli.methods.layers.base import Allocation, Survey, layer_allocation


@layer_allocation("uniform", title="uniform layers", source="Sun et al. 2023", config_only=True)
def uniform(survey: Survey, target: float) -> Allocation:
    """Every linear loses the target."""
    import torch

    return Allocation(target, torch.full_like(survey.counts, target), [None] * len(survey.names), {})
