"""Held-out samples: what was fitted on the others is kept only where it is no worse on these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimcli.methods.stats import HELDOUT, HELDOUT_CROSS, HELDOUT_DENSE, LinearStats

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Judged:
    """What held-out samples say of a `step`: squared errors of the outputs, over the dense outputs' square norm."""

    step: str
    before: float
    after: float

    @property
    def better(self) -> bool:
        """Whether what the step made is kept: it is no worse than what was there before."""
        return self.after <= self.before

    @property
    def remark(self) -> str:
        """What a report says of a step that was undone."""
        errors = f"{self.after:.4g} on held-out samples, {self.before:.4g} before"
        return f"{self.step} would have raised the error ({errors}), so what was before it stays"


def judge(step: str, dense: Tensor, before: Tensor, after: Tensor, stats: LinearStats) -> Judged:
    """Compare two sparse weights float32 [D_out, D_in] in the place of a dense one. Without held-out samples, equal."""
    return Judged(step, *(error(dense, one, stats) for one in (before, after)))


def error(dense: Tensor, found: Tensor, stats: LinearStats) -> float:
    """Squared error of held-out outputs over the dense ones' square norm; both weights float32 [D_out, D_in].

    Dense outputs are those on the same inputs, or on the dense model's where the statistics tell of them, too.
    """
    gram = stats[HELDOUT].to(dense.dtype)
    if HELDOUT_CROSS not in stats:
        return float(squared(found - dense, gram)) / (float(squared(dense, gram)) or 1.0)
    both = ((dense @ stats[HELDOUT_CROSS].to(dense.dtype)) * found).double().sum()
    whole = squared(dense, stats[HELDOUT_DENSE].to(dense.dtype))
    return float(squared(found, gram) - 2 * both + whole) / (float(whole) or 1.0)


def squared(weight: Tensor, gram: Tensor) -> Tensor:
    """Square norm of the outputs, tr(W G W^T), a scalar. weight: float32 [D_out, D_in]. gram: G, [D_in, D_in]."""
    return ((weight @ gram) * weight).double().sum()
