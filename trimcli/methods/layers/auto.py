"""Auto: the cheap allocations are tried on calibration samples, and the one that harms the model least is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from trimcli.errors import OptionError
from trimcli.methods.layers.base import ALLOCATIONS, Allocation, Survey, layer_allocation
from trimcli.methods.layers.projection import settle
from trimcli.methods.stats import SQNORM
from trimcli.options import check_fields, option, positive

if TYPE_CHECKING:
    from torch import Tensor

CHEAP = ("uniform", "owl", "dlp", "error", "depth")


def candidates() -> list[str]:
    """What can be tried: whatever needs no trials itself."""
    return [name for name, entry in ALLOCATIONS.items() if not entry.tries and entry.needs <= {SQNORM.name}]


@dataclass(frozen=True)
class AutoOptions:
    """What is tried, and on how much. Raises OptionError for a value that cannot be used."""

    tried: tuple[str, ...] = option(
        CHEAP, "Allocations to try, each at its defaults.", "--auto-methods", panel="Auto", choices=candidates
    )
    samples: int = option(
        16, "Try on the last so many calibration samples.", "--trial-samples", panel="Auto", check=positive
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.tried:
            raise OptionError("--auto-methods names nothing to try; give at least one, such as uniform,owl.")


class Tried(NamedTuple):
    """An allocation by name: what it proposes, settled on the target, and its loss."""

    name: str
    sparsity: Tensor
    metric: list[float | None]
    loss: float


def try_all(survey: Survey, target: float, names: Sequence[str], samples: slice) -> list[Tried]:
    """Each allocation at its defaults, with its loss on these samples, in the order given."""
    proposed = [ALLOCATIONS[name](survey, target) for name in names]
    settled = [settle(one.sparsity, survey.counts, target, "exact") for one in proposed]
    losses = survey.losses(settled, samples)
    parts = zip(names, settled, proposed, losses, strict=True)
    return [Tried(name, sparsity, one.metric, loss) for name, sparsity, one, loss in parts]


@layer_allocation(
    "auto",
    needs={SQNORM},
    title="auto",
    source="of the allocations here, by KL divergence on calibration text",
    options=AutoOptions,
    tries=True,
)
def auto(survey: Survey, target: float, options: AutoOptions) -> Allocation:
    """Tries the cheap allocations under wanda masks and keeps the one closest to the dense model's predictions."""
    found = try_all(survey, target, options.tried, slice(max(0, survey.samples - options.samples), survey.samples))
    best = min(found, key=lambda one: one.loss)
    parameters = {
        "chosen": best.name,
        "losses": {one.name: one.loss for one in found},
        "samples": min(options.samples, survey.samples),
    }
    return Allocation(target, best.sparsity, best.metric, parameters)
