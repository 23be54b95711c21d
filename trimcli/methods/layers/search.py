"""Search: sparsities evolve, weights moving between matrices or layers, on the losses of calibration samples."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from trimcli.methods.layers.auto import CHEAP, SCALES, try_all
from trimcli.methods.layers.base import Allocation, Survey, Trials, layer_allocation
from trimcli.methods.stats import SQNORM
from trimcli.options import above_zero, at_least, check_fields, option, positive

if TYPE_CHECKING:
    from torch import Tensor

PANEL = "Search"
# Candidates of one generation, which walk through the layers together.
TOGETHER = 8
# Moves that make up one mutation, at most.
MOVES = 3


@dataclass(frozen=True)
class SearchOptions:
    """How long and how far the search goes. Raises OptionError for a value that cannot be used."""

    search_evaluations: int = option(
        96, "Candidates to try, those of auto that it starts from among them.",
        panel=PANEL, check=at_least(len(CHEAP) + len(SCALES) + 1),
    )  # fmt: skip
    search_samples: int = option(
        8, "Try on the first so many calibration samples, at most half of them; check on as many of the last.",
        panel=PANEL, check=positive,
    )  # fmt: skip
    search_step: float = option(
        0.03, "How much sparsity a move gives the smaller of two parts.", panel=PANEL, check=above_zero
    )

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def trials(self) -> Trials:
        """For the plan; the start and the found are compared in the end."""
        return Trials(self.search_evaluations + 2, self.search_samples, TOGETHER)


@layer_allocation(
    "search",
    needs={SQNORM},
    title="search",
    source="Sieberling et al. 2024, section 4",
    options=SearchOptions,
    tries=True,
)
def search(survey: Survey, target: float, options: SearchOptions) -> Allocation:
    """Evolves the best cheap allocation by moves between matrices, layers and shapes, under wanda masks."""
    from trimcli.methods.layers.projection import settle

    count = min(options.search_samples, max(1, survey.samples // 2))
    fit, check = slice(0, count), slice(survey.samples - count, survey.samples)
    tried = try_all(survey, target, CHEAP, fit)
    start = tried[0]
    best, loss = start.sparsity, start.loss
    random, moves = Random(survey.seed), _Moves(survey, options.search_step)
    left, pending = options.search_evaluations - len(tried) if moves.parts else 0, None
    for _ in survey.each("generations", range(-(-left // TOGETHER))):
        changes = [moves.mutation(random) for _ in range(min(TOGETHER, left))]
        left -= len(changes)
        if pending is not None:
            changes[0] = pending
        made = [settle(best + change, survey.counts, target, "exact") for change in changes]
        losses = survey.losses(made, fit)
        better = sorted((one, place) for place, one in enumerate(losses) if one < loss)
        pending = None
        if better:
            before = best
            (loss, place), *others = better
            best = made[place]
            # What also helped may help beside it: tried together in the next generation.
            pending = sum((made[other] - before for _, other in others), start=best * 0) if others else None
    held = survey.losses([start.sparsity, best], check)
    kept = best if held[1] <= held[0] else start.sparsity
    parameters: dict[str, Any] = {"search_evaluations": options.search_evaluations, "search_step": options.search_step}
    parameters |= {"search_samples": fit.stop}
    parameters |= {"start": start.name, "losses": {"start": start.loss, "found": loss}}
    parameters |= {"heldout": {"start": held[0], "found": held[1]}, "kept": "found" if kept is best else "start"}
    return Allocation(target, kept, [None] * len(survey.names), parameters)


class _Moves:
    """Changes of the sparsities [n] that leave their weighted mean: between linears, decoder layers, and shapes."""

    def __init__(self, survey: Survey, step: float) -> None:
        place = {name: number for number, name in enumerate(survey.names)}
        shapes: dict[tuple[int, int], list[int]] = {}
        for name in survey.names:
            shapes.setdefault(survey.shapes[name], []).append(place[name])
        layers = [[place[name] for name in layer] for layer in survey.layers]
        ways = [[number] for number in place.values()], layers, list(shapes.values())
        self.parts = [parts for parts in ways if len(parts) > 1]
        self._counts, self._step = survey.counts, step

    def mutation(self, random: Random) -> Tensor:
        """One to three moves, fewer more often: a part loses as many weights more as another loses less."""
        import torch

        change = torch.zeros_like(self._counts)
        for _ in range(min(random.randint(1, MOVES), random.randint(1, MOVES))):
            giving, taking = random.sample(random.choice(self.parts), 2)
            sizes = self._counts[giving].sum(), self._counts[taking].sum()
            moved = self._step * min(sizes)
            change[giving] += moved / sizes[0]
            change[taking] -= moved / sizes[1]
        return change
