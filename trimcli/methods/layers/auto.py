"""Auto: the cheap allocations are tried on calibration samples, and the one that harms the model least is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from trimcli.errors import OptionError
from trimcli.methods.layers.base import ALLOCATIONS, Allocation, Survey, Trials, layer_allocation
from trimcli.methods.stats import SQNORM
from trimcli.options import check_fields, option, positive

if TYPE_CHECKING:
    from torch import Tensor

CHEAP = ("uniform", "owl", "dlp", "error", "depth")
# How much steeper than the best allocation its variants are.
SCALES = (0.5, 1.5, 2.0)


def candidates() -> list[str]:
    """What can be tried: whatever needs no trials itself."""
    return [name for name, entry in ALLOCATIONS.items() if not entry.tries and entry.needs <= {SQNORM.name}]


@dataclass(frozen=True)
class AutoOptions:
    """What is tried, and on how much. Raises OptionError for a value that cannot be used."""

    auto_methods: tuple[str, ...] = option(
        CHEAP, "Allocations to try, each at its defaults.", panel="Auto", choices=candidates
    )
    trial_samples: int = option(16, "Try on the last so many calibration samples.", panel="Auto", check=positive)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.auto_methods:
            raise OptionError("--auto-methods names nothing to try; give at least one, such as uniform,owl.")

    @property
    def trials(self) -> Trials:
        """For the plan."""
        first = len(self.auto_methods)
        return Trials(first + len(SCALES) + 1, self.trial_samples, max(first, len(SCALES) + 1))


class Tried(NamedTuple):
    """An allocation by name: what it proposes, settled on the target, and its loss."""

    name: str
    sparsity: Tensor
    metric: list[float | None]
    loss: float


def try_all(survey: Survey, target: float, names: Sequence[str], samples: slice) -> list[Tried]:
    """Each allocation at its defaults, then the best one flatter and steeper and blended with the next.

    With their losses on these samples, the best first.
    """
    proposed = {name: ALLOCATIONS[name](survey, target) for name in names}
    first = _tried(survey, target, {name: (one.sparsity, one.metric) for name, one in proposed.items()}, samples)
    best = first[0]
    variants = {}
    if bool((best.sparsity != target).any()):
        for scale in SCALES:
            variants[f"{best.name} x{scale:g}"] = target + scale * (best.sparsity - target), best.metric
    if len(first) > 1:
        variants[f"{best.name} + {first[1].name}"] = (best.sparsity + first[1].sparsity) / 2, best.metric
    found = first + (_tried(survey, target, variants, samples) if variants else [])
    return sorted(found, key=lambda one: one.loss)


def _tried(
    survey: Survey, target: float, proposed: Mapping[str, tuple[Tensor, list[float | None]]], samples: slice
) -> list[Tried]:
    from trimcli.methods.layers.projection import settle

    settled = [settle(sparsity, survey.counts, target, "exact") for sparsity, _ in proposed.values()]
    losses = survey.losses(settled, samples)
    parts = zip(proposed, settled, proposed.values(), losses, strict=True)
    found = [Tried(name, sparsity, metric, loss) for name, sparsity, (_, metric), loss in parts]
    return sorted(found, key=lambda one: one.loss)


@layer_allocation(
    "auto",
    needs={SQNORM},
    title="auto",
    source="trim 2026, by the fitness of Sieberling et al. 2024",
    options=AutoOptions,
    tries=True,
)
def auto(survey: Survey, target: float, options: AutoOptions) -> Allocation:
    """Tries the cheap ones and variants of the best; keeps what stays closest to the dense model's predictions."""
    count = min(options.trial_samples, survey.samples)
    found = try_all(survey, target, options.auto_methods, slice(survey.samples - count, survey.samples))
    best = found[0]
    losses = {one.name: one.loss for one in found}
    parameters = {"chosen": best.name, "losses": losses, "trial_samples": count}
    return Allocation(target, best.sparsity, best.metric, parameters)
