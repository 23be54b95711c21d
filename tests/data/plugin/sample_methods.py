"""Methods of another package: a score with an option, an update that needs a statistic of its own, an allocation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimcli.methods.choice import Choice
from trimcli.methods.layers.base import Allocation, Survey, layer_allocation, spread
from trimcli.methods.scores import score
from trimcli.methods.stats import SQNORM, LinearStats, statistic
from trimcli.methods.updates.base import Updated, update
from trimcli.options import option, positive


@dataclass(frozen=True)
class PowerOptions:
    """How the norms count."""

    norm_power: int = option(2, "The power of the input norm.", panel="Sample", check=positive)


@score("powered", needs={SQNORM}, compare="row", source="nobody 2026", options=PowerOptions)
def powered(weight: Tensor, stats: LinearStats, options: PowerOptions) -> Tensor:
    """Weight magnitude times a power of the input norm."""
    return weight.abs().float() * stats.sqnorm.sqrt() ** options.norm_power


def _add_mean(gathered: Tensor, inputs: Tensor, samples: slice, nsamples: int) -> None:
    gathered[samples] = inputs.float().mean(dim=1)


MEAN = statistic(
    "mean_input",
    lambda d_in, nsamples, device: torch.zeros(nsamples, d_in, device=device),
    help="mean input of every token",
    source="nobody 2026",
    add=_add_mean,
    finish=lambda gathered: gathered.mean(dim=0),
    nbytes=lambda d_in, nsamples: 4 * d_in * nsamples,
)


@update("rescale", needs={MEAN}, source="nobody 2026")
def rescale(weight: Tensor, choice: Choice) -> Updated:
    """The kept weights of a row grow until its mean output is the dense one's again."""
    keep = choice.of_matrix(weight)
    mean = choice.stats[MEAN]
    before, after = weight @ mean, (weight * keep) @ mean
    factor = torch.where(after.abs() > 1e-3, before / after, torch.ones_like(after)).clamp(0.5, 2)
    return Updated(keep, weight * keep * factor.unsqueeze(1), ("rows were rescaled",))


@layer_allocation("ramp", source="nobody 2026")
def ramp(survey: Survey, target: float) -> Allocation:
    """Later layers lose more."""
    depth = torch.linspace(-0.1, 0.1, len(survey.layers), dtype=torch.float64)
    return Allocation(target, spread(survey, target + depth), [None] * len(survey.names), {"rise": 0.2})
