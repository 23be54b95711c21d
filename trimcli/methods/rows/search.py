"""TRIM: a sparsity for every row of a matrix by iterative search (Beck et al. 2025, section 3)."""

from typing import NamedTuple

import torch
from torch import Tensor

from trimcli.methods import masks
from trimcli.methods.rows.base import RowResult
from trimcli.methods.rows.metrics import QUALITIES, ROW_QUALITIES, cosim_row
from trimcli.methods.rows.options import TrimOptions
from trimcli.methods.rows.product import Product, State
from trimcli.methods.rows.quality import Outputs
from trimcli.options import Numerics

_STEPS = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16)
_NEGATIVE_STEPS = (-0.01, -0.02, -0.04)
_CAP = 0.95


@torch.no_grad()
def search_rows(
    weight: Tensor,
    scores: Tensor,
    inputs: Tensor,
    target: float,
    options: TrimOptions | None = None,
    numerics: Numerics = "exact",
) -> RowResult:
    """Search the row sparsities of one matrix whose mean is `target`: rows whose outputs suffer little lose more.

    weight, scores: float [D_out, D_in]. inputs: float [D_in, N], the last token's of each sample. In exact numerics the
    counts sum to round(target * D_out * D_in) and, where whole counts allow it, no row loses more than the larger of
    95% and the target. Raises ValueError for shapes that do not fit, NaN and a target outside [0, 1].
    """
    options = options or TrimOptions()
    if scores.shape != weight.shape or inputs.ndim != 2 or inputs.shape[0] != weight.shape[1]:
        shapes = ", ".join(str(list(one.shape)) for one in (weight, scores, inputs))
        raise ValueError(f"weight, scores and inputs {shapes} do not fit [D_out, D_in], the same, and [D_in, N].")
    if not 0 <= target <= 1:
        raise ValueError(f"the target sparsity {target} is not between 0 and 1.")
    return _Search(Product(weight, scores, inputs), target, options, numerics).run()


class _Iterate(NamedTuple):
    sparsity: Tensor  # float32 [D_out]
    quality: float
    step: float = 0.0
    iteration: int = 0


class _Search:
    """The searches over one matrix; sparsities and row qualities are on the CPU, where they cost nothing."""

    def __init__(self, product: Product, target: float, options: TrimOptions, numerics: Numerics) -> None:
        self.product, self.target, self.options, self.numerics = product, target, options, numerics
        self._quality, self._row_quality = QUALITIES[options.qmetric], ROW_QUALITIES[options.qmetric_dimwise]
        sparsity = torch.full((product.d_out,), target, dtype=torch.float32)
        self._start = product.at(self._counts(sparsity))
        self._start_rows = self._row_quality(self._start.outputs)
        self._seen: dict[bytes, float] = {}
        self._uniform = _Iterate(sparsity, self._quality_of(self._start))

    def run(self) -> RowResult:
        """Search, then round the winner's sparsities to counts."""
        best = self._best()
        sparsity, counts = self._finish(best.sparsity)
        final = self.product.at(counts, near=self._start)
        return RowResult(
            keep=masks.keep_from_ranks(self.product.ranks, counts),
            counts=counts,
            row_sparsity=sparsity,
            quality_uniform=self._uniform.quality,
            quality_best=best.quality,
            step=best.step,
            iteration=best.iteration,
            variance_before=_cosine_variance(self._start.outputs),
            variance_after=_cosine_variance(final.outputs),
            row_quality_before=self._start_rows,
            row_quality_after=self._row_quality(final.outputs),
        )

    def _best(self) -> _Iterate:
        if self.options.qmetric == "pass":
            # The published comparison asks for more than the 1 that uniform sparsity has, too.
            return self._uniform if self.numerics == "reference" else self._search(_STEPS[0])
        best = self._over(_STEPS)
        return self._over(_NEGATIVE_STEPS) if best is self._uniform and not self.options.forbid_negative else best

    def _over(self, steps: tuple[float, ...]) -> _Iterate:
        """The best of searches with growing steps, up to the first that is no better than the one before."""
        best = previous = self._uniform
        for step in steps:
            found = self._search(step)
            if found.quality > best.quality:
                best = found
            if step != steps[0] and not found.quality > previous.quality:
                break
            previous = found
        return best

    def _search(self, step: float) -> _Iterate:
        """The best iterate of one search from uniform sparsity, or the last one under the metric `pass`."""
        best, state, rows = self._uniform, self._start, self._start_rows
        sparsity = self._uniform.sparsity
        for iteration in range(1, self.options.iterations + 1):
            if iteration > 1:
                rows = self._row_quality(state.outputs)
            lowest = rows.min()
            change = (rows - lowest) / (rows.max() - lowest + 1e-6) * (2 * step)
            moved = sparsity + (change - change.mean())  # rows of high quality can spare more
            if not moved.isfinite().all():
                break  # a row quality without a finite value, from which no sparsity follows
            sparsity = self._recentre(moved)
            state = self.product.at(self._counts(sparsity), near=state)
            quality = self._quality_of(state)
            if quality > best.quality or self.options.qmetric == "pass":
                best = _Iterate(sparsity, quality, step, iteration)
        return best

    def _quality_of(self, state: State) -> float:
        """Quality at a state; counts reached again have their first one, not one that rounding moved."""
        key = state.counts.numpy().tobytes()
        if key not in self._seen:
            self._seen[key] = float(self._quality(state.outputs))
        return self._seen[key]

    def _recentre(self, sparsity: Tensor) -> Tensor:
        """Bring float64 sparsities back into bounds and onto the target; float32."""
        if self.numerics == "exact":
            return self._project(sparsity, _CAP)
        clipped = sparsity.float().clamp_(0, _CAP)
        return clipped - clipped.mean() + self.target

    def _project(self, sparsity: Tensor, cap: float) -> Tensor:
        return masks.project(sparsity, torch.ones_like(sparsity), self.target, cap).float()

    def _counts(self, sparsity: Tensor) -> Tensor:
        """Row counts of an iterate: floors, or in exact numerics the nearest ones, nearer to what is then pruned."""
        half = 0.5 if self.numerics == "exact" else 0.0
        return (self.product.d_in * sparsity + half).long().clamp_(0, self.product.d_in)

    def _finish(self, sparsity: Tensor) -> tuple[Tensor, Tensor]:
        """Final row sparsities and their counts."""
        if self.numerics == "reference":
            sparsity = self._recentre(sparsity)
            return sparsity, self._counts(sparsity)
        d_out, d_in = self.product.d_out, self.product.d_in
        # A cap of whole weights, so that rounding takes no row above it. The tolerance is for the likes of 0.95 * 20.
        whole = int(_CAP * d_in + 1e-9) / d_in
        sparsity = self._project(sparsity, whole if whole >= self.target else _CAP)
        return sparsity, masks.round_row_counts(sparsity, d_in, masks.matrix_budget(d_out, d_in, self.target))


def _cosine_variance(outputs: Outputs) -> float:
    cosine: Tensor = cosim_row(outputs)
    return float(cosine.var()) if cosine.numel() > 1 else 0.0
