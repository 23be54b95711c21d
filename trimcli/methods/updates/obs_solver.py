"""The arithmetic of OBS, column by column, and U, the upper Cholesky factor of H^-1, of which row c is for step c."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimcli.errors import TrimError
from trimcli.methods.choice import Choice
from trimcli.methods.updates.grid import Grid

_LAST_DAMPING = 1e3


@dataclass(frozen=True)
class DampingReport:
    """What it took to factorise one Gram: lambda over mean(diag H), asked for and used, lambda, and the last dtype."""

    requested: float
    damping: float
    added: float
    attempts: int
    dtype: str
    dead_columns: int

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences on what was out of the ordinary; empty when nothing was."""
        found = []
        if self.attempts > 1:
            found.append(
                f"the Gram could not be factorised with damping {self.requested:g}; "
                f"damping {self.damping:g} in {self.dtype} held at attempt {self.attempts}."
            )
        if self.dead_columns:
            found.append(f"{self.dead_columns} input channels never fire; their weights became zero.")
        return tuple(found)


@dataclass(frozen=True)
class Factor:
    """A factorised Gram. upper: float32 [D_in, D_in], U^T U = (H + lambda I)^-1. dead: bool [D_in], where H_cc = 0."""

    upper: Tensor
    dead: Tensor
    report: DampingReport


@torch.no_grad()
def factorise(gram: Tensor, damping: float = 0.01) -> Factor:
    """Upper Cholesky factor of the inverse of the damped Gram, with retries (section 3 of the paper).

    gram: H, float32 or float64 [D_in, D_in]. damping: lambda / mean(diag H), H_cc = 1 where a column never fires. The
    first attempt runs in the Gram's dtype, others in float64, each with ten times the damping. Raises ValueError for
    what is no Gram, TrimError when even 1000 times the mean, or near it, does not help.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"the Gram has shape {tuple(gram.shape)} where a square matrix is needed.")
    diagonal = gram.diagonal()
    dead = diagonal == 0
    facts = (torch.isfinite(gram).all(), diagonal.min(), diagonal.double().masked_fill(dead, 1.0).mean(), dead.sum())
    finite, lowest, mean, dead_columns = torch.stack([fact.double() for fact in facts]).tolist()
    if not finite:
        raise ValueError("the Gram holds NaN or infinite values; the layer's inputs overflowed or are NaN themselves.")
    if lowest < 0:
        raise ValueError(f"the Gram's diagonal holds {lowest:g}, but sums of squares are never negative.")
    used, dtype, attempts = damping, gram.dtype, 1
    while (upper := _upper(gram, dead, used * mean, dtype)) is None:
        if used * 10 > _LAST_DAMPING:
            what = f"the Gram could not be factorised, not even in float64 with damping {used:g}"
            raise TrimError(f"{what}; calibrate with other or more samples, or prune with --method wanda.")
        used, dtype, attempts = used * 10, torch.float64, attempts + 1
    name = str(dtype).removeprefix("torch.")
    return Factor(upper, dead, DampingReport(damping, used, used * mean, attempts, name, int(dead_columns)))


def prune_block(
    updated: Tensor,
    keep: Tensor,
    upper: Tensor,
    start: int,
    end: int,
    choice: Choice | None,
    stride: int,
    grid: Grid | None = None,
) -> None:
    """Prune columns start..end-1 in place, `stride` of `keep` chosen at a time by a `choice`, and update the rest.

    grid: what kept weights are rounded to, each group's from its weights as they are when its first column's turn
    comes; groups begin with a block or end with it.
    """
    rows = updated[:, start:end].T.contiguous()  # the inner loop wants a column's weights side by side
    stays = keep[:, start:end].T.contiguous()
    corner = upper[start:end, start:end]
    errors = torch.empty_like(rows)
    # Taken apart at once: on small matrices, picking a column takes as long as what is done to it.
    columns, kept, off, steps, pivots = (
        one.unbind() for one in (rows, stays, errors, corner.contiguous(), corner.diagonal())
    )
    for i in range(end - start):
        if choice is not None and i % stride == 0:
            reached = slice(i, i + stride)
            stays[reached] = choice.of_columns(rows[reached].T, start + i).T
        if grid is None:
            torch.div(columns[i].masked_fill(kept[i], 0.0), pivots[i], out=off[i])
        else:
            group, place = divmod(start + i, grid.group_size)
            if place == 0:
                here = updated[:, start : start + grid.group_size] if i == 0 else rows[i : i + grid.group_size].T
                grid.fit(group, here)
            rounded = grid.values(grid.nearest(columns[i], start + i), start + i).masked_fill_(~kept[i], 0.0)
            torch.div(columns[i] - rounded, pivots[i], out=off[i])
            rows[i] = rounded
        rows[i + 1 :].addr_(steps[i][i + 1 :], off[i], alpha=-1)
    updated[:, start:end] = rows.masked_fill_(~stays, 0.0).T
    keep[:, start:end] = stays.T
    updated[:, end:].addmm_(errors.T, upper[start:end, end:], alpha=-1)


def _upper(gram: Tensor, dead: Tensor, added: float, dtype: torch.dtype) -> Tensor | None:
    """U with U^T U = (gram + added I)^-1 in float32, computed in `dtype`; None where that fails."""
    # With J the reversal of the channels and J H J = L L^T, U is J L^-1 J. To factorise H^-1 as well would fail sooner.
    flipped = gram.to(dtype).flip(0, 1)
    flipped.diagonal().masked_fill_(dead.flip(0), 1.0).add_(added)
    lower, info = torch.linalg.cholesky_ex(flipped)
    del flipped
    if int(info) != 0:
        return None
    identity = torch.eye(lower.shape[0], dtype=dtype, device=lower.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).float()
    sound = torch.isfinite(upper).all() & (upper.diagonal() > 0).all()
    return upper if sound else None
