"""What a training leaves of itself in a manifest: its curves, and which step stands."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

Curve = list[tuple[int, float]]
"""Pairs (step, nats a token)."""


@dataclass(frozen=True)
class Record:
    """One phase of a training, by the loss in nats a token.

    loss: of the samples trained on, the teacher's part included. heldout: next-token loss of held-out samples, first
    before any step. best: the step whose weights stand, 0 where none was better than the weights before.
    """

    phase: str
    steps: int
    tokens: int
    loss: Curve
    heldout: Curve
    best: int
    stopped_early: bool = False

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    @property
    def before(self) -> float:
        """Held-out loss before the first step."""
        return self.heldout[0][1]

    @property
    def after(self) -> float:
        """Held-out loss of the weights that stand."""
        return dict(self.heldout)[self.best]


def curves(history: Iterable[Mapping[str, Any]], key: str) -> Curve:
    """The values of `key` in the log of transformers' Trainer by step, each step once."""
    return list({int(entry["step"]): float(entry[key]) for entry in history if key in entry}.items())
