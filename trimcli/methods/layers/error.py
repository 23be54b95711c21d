"""Error: matrices whose output suffers more at a trial sparsity keep more, each projection by itself."""

from __future__ import annotations

from dataclasses import dataclass

from trimcli.methods.layers.base import Allocation, Survey, layer_allocation
from trimcli.methods.layers.owl import keep_ratios
from trimcli.methods.scores import wanda
from trimcli.methods.stats import SQNORM
from trimcli.options import check_fields, not_negative, option


@dataclass(frozen=True)
class ErrorOptions:
    """How errors become sparsities. Raises OptionError for a value that cannot be used."""

    error_alpha: float = option(0.06, "How far a matrix may lie from the target.", panel="Error", check=not_negative)

    def __post_init__(self) -> None:
        check_fields(self)


@layer_allocation(
    "error",
    needs={SQNORM},
    title="error",
    source="trim 2026, no paper: output errors under the masks of Sun et al. 2023",
    options=ErrorOptions,
)
def error(survey: Survey, target: float, options: ErrorOptions) -> Allocation:
    """Matrices whose output suffers more at the target keep more, each projection by itself."""
    import torch

    from trimcli.methods.masks import even_row_counts, sort_rows

    def suffered(name: str) -> float:
        scores = wanda(survey.weight(name), survey.stats(name))
        ordered = sort_rows(scores).double().square_()
        counts = even_row_counts(scores.shape[0], scores.shape[1], target, "exact", scores.device)
        going = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
        return float(ordered[going].sum() / ordered.sum().clamp(min=torch.finfo(torch.float64).tiny))

    errors: list[float | None] = [suffered(name) for name in survey.each("errors", survey.names)]
    found = torch.tensor(errors, dtype=torch.float64)
    return Allocation(
        target, 1 - keep_ratios(found, target, options.error_alpha), errors, {"error_alpha": options.error_alpha}
    )
