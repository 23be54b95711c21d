"""What a layer allocation may look at, made up for a test."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from trimcli.methods.stats import LinearStats

T = TypeVar("T")


class MadeSurvey:
    """A survey of linears by decoder layer, with random weights and input norms.

    asked: what was looked at, in order. loss: of a candidate on one sample, by the sample's number; tried: how often it
    was asked for.
    """

    seed = 3
    samples = 12

    def __init__(
        self, layers: Sequence[Sequence[str]], shapes: Mapping[str, tuple[int, int]], imported: Tensor | None = None
    ) -> None:
        self.layers, self.shapes, self.imported = layers, shapes, imported
        self.names = [name for layer in layers for name in layer]
        self.counts = torch.tensor([d_out * d_in for d_out, d_in in shapes.values()], dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        self.weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        self.norms = {name: torch.rand(shape[1], generator=generator) * 9 for name, shape in shapes.items()}
        self.known: dict[str, dict[str, float]] = {}
        self.asked: list[tuple[str, str]] = []
        self.loss: Callable[[Tensor, int], float] = lambda candidate, sample: float(candidate[0])
        self.tried: list[tuple[Tensor, slice]] = []

    def weight(self, name: str) -> Tensor:
        self.asked.append(("weight", name))
        return self.weights[name]

    def stats(self, name: str) -> LinearStats:
        self.asked.append(("stats", name))
        return LinearStats(sqnorm=self.norms[name])

    def remembered(self, metric: str, find: Callable[[str], Mapping[str, float]]) -> list[float]:
        self.asked.append(("remembered", metric))
        for name in self.names:
            if metric not in self.known.get(name, {}):
                self.known[name] = {**self.known.get(name, {}), **find(name)}
        return [self.known[name][metric] for name in self.names]

    def losses(self, candidates: Sequence[Tensor], samples: slice) -> list[float]:
        self.tried += [(candidate, samples) for candidate in candidates]
        chosen = range(samples.start, samples.stop)
        return [sum(self.loss(one, sample) for sample in chosen) / len(chosen) for one in candidates]

    def each(self, title: str, items: Sequence[T]) -> Iterable[T]:
        return items
