"""SparseGPT: one matrix and one Gram in, pruned and updated weights out (Frantar & Alistarh 2023).

The loss of a pruned row w' against its dense w is (w - w') H (w - w')^T with H the Gram of the inputs. Going
through the columns from left to right, a weight that goes is set to zero and the weights to its right are
moved to the optimum; what lies to the left is frozen. With U the upper Cholesky factor of H^-1, row c of U
holds all that step c needs: U_cc^2 is the (c, c) entry of the inverse of the Hessian that remains at c.

Three choices are independent of each other: the score that picks the mask (`UpdateOptions.mask_score`), when
it is picked (`UpdateOptions.mask_update`), and the budget: a sparsity, N:M, or counts per row such as TRIM's.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from trimcli.errors import OptionError, TrimError
from trimcli.methods import masks
from trimcli.methods.masks import Numerics
from trimcli.methods.scores import LinearStats, magnitude, wanda
from trimcli.options import one_of

MaskScore = Literal["obs", "wanda", "magnitude"]
MaskUpdate = Literal["once", "block"]

_Budget = float | tuple[int, int] | Tensor

_LAST_DAMPING = 1e3


@dataclass(frozen=True)
class UpdateOptions:
    """How SparseGPT chooses its mask and updates the weights.

    damping: lambda / mean(diag H), above zero. block_size: columns that are updated together.
    numerics: "exact" meets the budget to the weight, "reference" is the published arithmetic.
    mask_score: what picks the mask. "obs" is w^2 / U_cc^2 as published, "wanda" and "magnitude" are the
    ablations of Sun et al. 2023, section 5.
    mask_update: "once" fixes the mask beforehand from the weights as given, "block" chooses it anew in every
    block of columns (N:M: in every group) from the weights as updated so far. None is the published choice
    for the score: "block" for obs, "once" for wanda and magnitude. Counts per row always take "once".

    Raises OptionError for a value outside these.
    """

    damping: float = 0.01
    block_size: int = 128
    numerics: Numerics = "exact"
    mask_score: MaskScore = "obs"
    mask_update: MaskUpdate | None = None

    def __post_init__(self) -> None:
        """Refuse values that no matrix could be pruned with."""
        _check_damping(self.damping)
        if self.block_size < 1:
            raise OptionError(f"--block-size {self.block_size} holds no column; give at least 1 (the default is 128).")
        one_of("--mask-score", self.mask_score, get_args(MaskScore))
        if self.mask_update is not None:
            one_of("--mask-update", self.mask_update, get_args(MaskUpdate))


@dataclass(frozen=True)
class DampingReport:
    """What it took to factorise one Gram.

    requested, damping: lambda / mean(diag H) as asked for and as used. added: lambda itself.
    attempts: factorisations tried; the last one held. dtype: that one's, "float32" or "float64".
    dead_columns: how many input channels never fire.
    """

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
    """A factorised Gram; linears that share an input share it.

    upper: float32 [D_in, D_in], U with U^T U = (H + lambda I)^-1. dead: bool [D_in], True where H_cc = 0.
    """

    upper: Tensor
    dead: Tensor
    report: DampingReport


@dataclass(frozen=True)
class SparseGPTResult:
    """A pruned matrix.

    weight: float32 [D_out, D_in], exactly zero wherever keep is False. keep: bool [D_out, D_in].
    The weights of dead columns are zero whatever keep says: they are the first to go, but a budget smaller
    than their number leaves some of them marked as kept, so that counts hold.
    """

    weight: Tensor
    keep: Tensor
    report: DampingReport


@torch.no_grad()
def factorise(gram: Tensor, damping: float = 0.01) -> Factor:
    """Upper Cholesky factor of the inverse of the damped Gram, with retries (section 3 of the paper).

    gram: H, float32 or float64 [D_in, D_in], left as it is. damping: lambda / mean(diag H), the mean taken
    after H_cc = 1 was set for the columns that never fire. The first attempt runs in the Gram's dtype; each
    failure is followed by an attempt with ten times the damping, in float64.

    Raises OptionError for a damping that is not positive, ValueError for a Gram that is not square, not
    finite or negative on its diagonal, TrimError when even 1000 times the mean, or near it, does not help.
    """
    _check_damping(damping)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"the Gram has shape {tuple(gram.shape)} where a square matrix is needed.")
    if not torch.isfinite(gram).all():
        raise ValueError("the Gram holds NaN or infinite values; the layer's inputs overflowed or are NaN themselves.")
    diagonal = gram.diagonal()
    if (diagonal < 0).any():
        raise ValueError(
            f"the Gram's diagonal holds {diagonal.min().item():g}, but sums of squares are never negative."
        )
    dead = diagonal == 0
    mean = diagonal.double().masked_fill(dead, 1.0).mean().item()
    used, dtype, attempts = damping, gram.dtype, 1
    while (upper := _upper(gram, dead, used * mean, dtype)) is None:
        if used * 10 > _LAST_DAMPING:
            raise TrimError(
                f"the Gram could not be factorised, not even in float64 with damping {used:g}; "
                "calibrate with other or more samples, or prune with --method wanda, which needs no Gram."
            )
        used, dtype, attempts = used * 10, torch.float64, attempts + 1
    report = DampingReport(
        requested=damping,
        damping=used,
        added=used * mean,
        attempts=attempts,
        dtype=str(dtype).removeprefix("torch."),
        dead_columns=int(dead.sum()),
    )
    return Factor(upper, dead, report)


@torch.no_grad()
def obs_scores(weight: Tensor, factor: Factor) -> Tensor:
    """SparseGPT's score of every weight, w^2 / U_cc^2; the lowest go first.

    weight: [D_out, D_in] as given, before any update. Returns float32 [D_out, D_in]; zero in dead columns.
    """
    scores: Tensor = (weight.float() / factor.upper.diagonal()).square_()
    return scores.masked_fill_(factor.dead, 0.0)


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    gram: Tensor | Factor,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    row_counts: Tensor | None = None,
    sqnorm: Tensor | None = None,
    options: UpdateOptions | None = None,
) -> SparseGPTResult:
    """Prune one matrix and let the weights that stay make up for those that go (algorithm 1 of the paper).

    weight: [D_out, D_in], left as it is. gram: [D_in, D_in] float32 or float64, or its Factor, in which case
    options.damping plays no part. Exactly one budget: sparsity, the fraction to zero; pattern (kept, group),
    N:M; or row_counts, int64 [D_out], the number of weights that go from each row. sqnorm: float32 [D_in],
    needed by mask_score "wanda". Everything lies on one device, row_counts anywhere.

    Under a sparsity, obs and magnitude choose among all rows together and wanda in every row alike. Chosen
    block by block, the first c columns have lost round(sparsity * D_out * c) weights whenever a block ends
    at c; in reference numerics every block is pruned to the sparsity by itself, as published.

    Raises OptionError for options that do not go together, ValueError for tensors or budgets that do not fit,
    and what `factorise` raises.
    """
    options = options or UpdateOptions()
    d_out, d_in = weight.shape
    given: list[_Budget] = [budget for budget in (sparsity, pattern, row_counts) if budget is not None]
    if len(given) != 1:
        raise ValueError(f"SparseGPT takes one of sparsity, pattern and row_counts, but {len(given)} were given.")
    _check_budget(given[0], d_out, d_in)
    once = _fixed_beforehand(given[0], options)
    if options.mask_score == "wanda" and sqnorm is None:
        raise ValueError("mask_score wanda needs sqnorm, the inputs' square norms.")
    factor = gram if isinstance(gram, Factor) else factorise(gram, options.damping)
    if factor.upper.shape[0] != d_in:
        raise ValueError(f"a Gram of {factor.upper.shape[0]} channels does not fit a weight of {d_in} inputs.")

    updated = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    updated[:, factor.dead] = 0.0
    choice = _Choice(given[0], options, factor.upper.diagonal(), sqnorm)
    keep = choice(updated, 0) if once else torch.ones_like(updated, dtype=torch.bool)
    for start in range(0, d_in, options.block_size):
        end = min(start + options.block_size, d_in)
        _prune_block(updated, keep, factor.upper, start, end, None if once else choice)
    return SparseGPTResult(updated, keep, factor.report)


@dataclass(frozen=True)
class _Choice:
    """The rule that chooses which weights go: a score and a budget."""

    budget: _Budget
    options: UpdateOptions
    diagonal: Tensor
    sqnorm: Tensor | None

    @property
    def stride(self) -> int:
        """Columns chosen at a time when the mask is chosen anew."""
        return self.budget[1] if isinstance(self.budget, tuple) else self.options.block_size

    def __call__(self, weight: Tensor, start: int) -> Tensor:
        """The keep mask of the columns from `start` on, as many as `weight` [D_out, n] has."""
        d_out, end = weight.shape[0], start + weight.shape[1]
        scores = self._scores(weight, slice(start, end))
        if isinstance(self.budget, tuple):
            return masks.n_of_m(scores, *self.budget)
        if isinstance(self.budget, Tensor):
            return masks.lowest_per_row(scores, self.budget)
        if self.options.mask_score == "wanda":
            return masks.lowest_per_row(scores, self._even_counts(d_out, start, end, self.budget))
        if self.options.numerics == "reference":
            return masks.lowest_overall(scores, self.budget, "reference")
        total = masks.matrix_budget(d_out, end, self.budget) - masks.matrix_budget(d_out, start, self.budget)
        counts, threshold = masks.lowest_counts(scores, total)
        return masks.split_rows(scores, counts.new_full(counts.shape, threshold, dtype=scores.dtype), counts)

    def _scores(self, weight: Tensor, columns: slice) -> Tensor:
        if self.options.mask_score == "obs":
            return (weight / self.diagonal[columns]).square_()
        if self.options.mask_score == "magnitude":
            return magnitude(weight, LinearStats())
        return wanda(weight, LinearStats(sqnorm=None if self.sqnorm is None else self.sqnorm[columns]))

    def _even_counts(self, d_out: int, start: int, end: int, sparsity: float) -> Tensor:
        """Weights to go from each row when all rows share alike; exact counts add up over the blocks."""
        if self.options.numerics == "reference":
            return masks.even_row_counts(d_out, end - start, sparsity, "reference")
        before = masks.even_row_counts(d_out, start, sparsity, "exact")
        return masks.even_row_counts(d_out, end, sparsity, "exact") - before


def _prune_block(updated: Tensor, keep: Tensor, upper: Tensor, start: int, end: int, choice: _Choice | None) -> None:
    """Prune columns start..end-1 in place and move what stays in them and to their right.

    choice: where given, the mask is chosen by it, and written to `keep`, as the columns are reached.
    """
    rows = updated[:, start:end].T.contiguous()  # the inner loop wants a column's weights side by side
    stays = keep[:, start:end].T.contiguous()
    corner = upper[start:end, start:end]
    errors = torch.empty_like(rows)
    for i in range(end - start):
        if choice is not None and i % choice.stride == 0:
            reached = slice(i, i + choice.stride)
            stays[reached] = choice(rows[reached].T, start + i).T
        torch.div(rows[i].masked_fill(stays[i], 0.0), corner[i, i], out=errors[i])
        rows[i + 1 :].addr_(corner[i, i + 1 :], errors[i], alpha=-1)
    updated[:, start:end] = rows.masked_fill_(~stays, 0.0).T
    keep[:, start:end] = stays.T
    updated[:, end:].addmm_(errors.T, upper[start:end, end:], alpha=-1)


def _upper(gram: Tensor, dead: Tensor, added: float, dtype: torch.dtype) -> Tensor | None:
    """U with U^T U = (gram + added I)^-1 in float32, computed in `dtype`; None where that fails.

    With J the reversal of the channels and J H J = L L^T, U is J L^-1 J: the factor that inverting H and
    factorising the inverse would give, without that second factorisation, which fails sooner than the first.
    """
    flipped = gram.to(dtype).flip(0, 1)
    diagonal = flipped.diagonal()
    diagonal.masked_fill_(dead.flip(0), 1.0).add_(added)
    lower, info = torch.linalg.cholesky_ex(flipped)
    del flipped, diagonal
    if int(info) != 0:
        return None
    identity = torch.eye(lower.shape[0], dtype=dtype, device=lower.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).float()
    sound = torch.isfinite(upper).all() & (upper.diagonal() > 0).all()
    return upper if sound else None


def _fixed_beforehand(budget: _Budget, options: UpdateOptions) -> bool:
    """Whether the mask is chosen once, before any update. Raises OptionError for a choice that cannot be."""
    if isinstance(budget, Tensor):
        if options.mask_update == "block":
            raise OptionError(
                "--mask-update block does not go with --use-trim, whose counts per row do not say "
                "how much each block of a row loses; use --mask-update once."
            )
        return True
    if (options.mask_update or ("block" if options.mask_score == "obs" else "once")) == "once":
        return True
    if isinstance(budget, tuple) and options.block_size % budget[1]:
        kept, group = budget
        raise OptionError(
            f"--block-size {options.block_size} cuts through the groups of --sparsity-type {kept}:{group}; "
            f"give a multiple of {group}, such as {group * max(1, options.block_size // group)}."
        )
    return False


def _check_budget(budget: _Budget, d_out: int, d_in: int) -> None:
    if isinstance(budget, tuple):
        kept, group = budget
        if not 0 < kept < group or d_in % group:
            raise ValueError(f"{kept}:{group} does not fit rows of {d_in} weights; group must divide that.")
    elif isinstance(budget, Tensor):
        if budget.shape != (d_out,) or bool(((budget < 0) | (budget > d_in)).any()):
            raise ValueError(f"row_counts must hold a number from 0 to {d_in} for each of {d_out} rows.")
    elif not 0.0 <= budget <= 1.0:
        raise ValueError(f"the sparsity {budget} is not between 0 and 1.")


def _check_damping(damping: float) -> None:
    if not (math.isfinite(damping) and damping > 0):
        raise OptionError(f"--damping {damping:g} must be a positive number; the default is 0.01.")
