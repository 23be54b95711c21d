"""The Wanda variant: row by row, weights go while their scores' running sum stays small."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimcli.methods.rows.base import Rows, row_allocation
from trimcli.options import Numerics

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.choice import Choice


@row_allocation("variant", only="wanda", title="variant", source="Sun et al. 2023, appendix")
def variant(weight: Tensor, choice: Choice) -> Rows:
    """The Wanda paper's variant: weights go while their scores' running sum in the row stays small."""
    return Rows(variant_keep(choice.scores(weight), choice.target.sparsity, choice.numerics))


def variant_keep(scores: Tensor, sparsity: float, numerics: Numerics) -> Tensor:
    """Keep mask of the Wanda variant, bool [D_out, D_in], from scores likewise (Sun et al. 2023, appendix).

    A weight goes when the running sum of its row's ascending scores up to it is at most alpha times the row's sum, one
    alpha for the matrix, chosen to reach `sparsity`. exact: round(sparsity * D_out * D_in) weights go, those of lowest
    running sum relative to their row's sum. reference: alpha by bisection to within 0.001, and scores equal to the last
    that goes in their row go with it. Raises ValueError for a row without a finite sum.
    """
    from trimcli.methods.masks import lowest_counts, matrix_budget, row_thresholds, sort_rows, split_rows

    scores = scores.contiguous()
    sums = scores.sum(dim=1)
    if not sums.isfinite().all():
        raise ValueError("a row's scores have no finite sum; the weights or their statistics are damaged.")
    ordered = sort_rows(scores)
    running = ordered.cumsum(dim=1)
    if numerics == "reference":
        return scores > _bisect(ordered, running, sums, sparsity).unsqueeze(1)
    # A row of zeros costs nothing at any alpha: its running sums are zero, so any divisor will do.
    relative = running.div_(sums.masked_fill(sums == 0, 1).unsqueeze(1))
    counts, _ = lowest_counts(relative, matrix_budget(scores.shape[0], scores.shape[1], sparsity))
    return split_rows(scores, row_thresholds(ordered, counts), counts)


def _bisect(ordered: Tensor, running: Tensor, sums: Tensor, sparsity: float) -> Tensor:
    """The highest score that goes in every row, [D_out], at the alpha that bisection ends with."""
    import torch

    from trimcli.methods.masks import row_thresholds

    alpha, low, high = 0.4, 0.0, 0.8
    while True:
        counts = torch.searchsorted(running, (sums * alpha).unsqueeze(1), right=True).squeeze(1)
        thresholds = row_thresholds(ordered, counts)
        going = torch.searchsorted(ordered, thresholds.unsqueeze(1), right=True)
        # float32, as the published code compares it.
        achieved = going.sum() / ordered.numel()
        if (achieved - sparsity).abs() <= 0.001 or high - low < 0.001:
            return thresholds
        low, high = (low, alpha) if achieved > sparsity else (alpha, high)
        alpha = (low + high) / 2
