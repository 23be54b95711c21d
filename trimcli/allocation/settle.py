"""The last step of every method: onto the target, or as the published code left it."""

import math

import torch
from torch import Tensor

from trimcli.errors import OptionError
from trimcli.masks import Numerics, project

CAP = 0.99
FLOOR = 0.01


def uniform(count: int, target: float) -> Tensor:
    """The target for each of `count` linears, float64 [count]."""
    return torch.full((count,), target, dtype=torch.float64)


def settle(sparsity: Tensor, weights: Tensor, target: float, numerics: Numerics) -> Tensor:
    """The sparsities to write.

    sparsity: float64 [n], one per linear, as a method proposes them. weights: [n], their weight counts.
    `exact`: projected onto {0 <= s <= max(0.99, target), mean weighted by `weights` = target}, one shift for
    all. `reference`: neither clipped nor shifted, but what is not positive becomes 0.01. Returns float64 [n].
    Raises OptionError where `reference` leaves a sparsity above 1 or one that is no number.
    """
    if numerics == "exact":
        return project(sparsity, weights, target, max(CAP, target))
    result = torch.where(sparsity <= 0, FLOOR, sparsity)
    worst = float(result.max())
    if not worst <= 1:
        raise OptionError(
            f"reference numerics give a linear the sparsity {worst:.4g}, above 1; "
            "lower --lambda, --epsilon or --sparsity, or use --numerics exact."
        )
    return result


def weighted_mean(sparsity: Tensor, weights: Tensor) -> float:
    """Mean of `sparsity` [n] weighted by the weight counts `weights` [n]: the share of weights that go."""
    return math.fsum((sparsity.double() * weights.double()).tolist()) / float(weights.double().sum())
