"""The last step of every method: onto the target, or as the published code left it."""

import math

import torch
from torch import Tensor

from trimcli.methods.masks import project
from trimcli.options import Numerics

CAP = 0.99
FLOOR = 0.01


def settle(sparsity: Tensor, weights: Tensor, target: float, numerics: Numerics) -> Tensor:
    """The sparsities to write, float64 [n], from those proposed and the linears' weight counts [n].

    `exact`: projected onto {0 <= s <= max(0.99, target), weighted mean = target}, one shift for all. `reference`: as
    they are, though above 1; what is not positive becomes 0.01.
    """
    if numerics == "exact":
        return project(sparsity, weights, target, max(CAP, target))
    return torch.where(sparsity <= 0, FLOOR, sparsity)


def weighted_mean(sparsity: Tensor, weights: Tensor) -> float:
    """Mean of `sparsity` [n] weighted by the weight counts `weights` [n]: the share of weights that go."""
    return math.fsum((sparsity.double() * weights.double()).tolist()) / float(weights.double().sum())
