"""AlphaPruning: matrices with a heavier spectral tail lose less (Lu et al. 2024, sections 3.2 and 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trimcli.errors import OptionError
from trimcli.methods.layers.base import Allocation, Survey, layer_allocation, spread
from trimcli.methods.layers.ww_metrics import COLUMNS
from trimcli.options import check_fields, not_negative, option

if TYPE_CHECKING:
    from torch import Tensor

METRICS = ("alpha_peak", "alpha_mid", "norm", *COLUMNS)
# Metrics this close, relative to the largest, are equal: the means of equal metrics differ in the last bits.
EQUAL = 1e-12
PANEL = "AlphaPruning"


@dataclass(frozen=True)
class AlphaOptions:
    """How spectra become sparsities. Raises OptionError for a value that cannot be used."""

    ww_metric: str = option(
        "alpha_peak",
        "The shape of a spectrum: alpha_peak, alpha_mid, norm, or one of weightwatcher's ten.",
        panel=PANEL,
        choices=lambda: METRICS,
    )
    epsilon: float = option(0.3, "The spread of the layers' shares.", panel=PANEL, check=not_negative)
    mapping_type: Literal["block", "layer"] = option(
        "block", "block gives a decoder layer's linears their mean metric, layer leaves them apart.", panel=PANEL
    )

    def __post_init__(self) -> None:
        check_fields(self)


@layer_allocation(
    "alpha",
    title="AlphaPruning",
    source="Lu et al. 2024, section 3",
    options=AlphaOptions,
    imports="metrics",
    remembers=True,
    weight_bytes=12,
)
def alpha(survey: Survey, target: float, options: AlphaOptions) -> Allocation:
    """Matrices whose spectrum has a heavier tail lose less."""
    import torch

    from trimcli.methods.layers.spectra import cache_key, measure

    def find(name: str) -> dict[str, float]:
        found = measure(options.ww_metric, name, survey.weight(name), survey.seed)
        return {cache_key(other, survey.seed): value for other, value in found.items()}

    parameters: dict[str, Any] = {"epsilon": options.epsilon, "mapping_type": options.mapping_type}
    if (metrics := survey.imported) is None:
        measured = survey.remembered(cache_key(options.ww_metric, survey.seed), find)
        metrics = torch.tensor(measured, dtype=torch.float64)
        parameters["ww_metric"] = options.ww_metric
    layers, by_block = spread(survey, torch.arange(len(survey.layers))), options.mapping_type == "block"
    sparsity = sparsities(metrics, layers, survey.counts, target, options.epsilon, by_block=by_block)
    return Allocation(target, sparsity, list(metrics.tolist()), parameters)


def sparsities(
    metrics: Tensor, layers: Tensor, weights: Tensor, target: float, epsilon: float, *, by_block: bool
) -> Tensor:
    """From a metric per linear to a sparsity per linear, float64 [n] (Lu et al. 2024, equation 3). Raises OptionError.

    layers: int [n], each linear's. weights: [n], counts. epsilon: the largest and the smallest sparsity are as 1 +
    epsilon to 1 - epsilon. by_block: a decoder layer's linears share their mean metric.
    """
    import torch

    if by_block:
        blocks = int(layers.max()) + 1
        sums = torch.zeros(blocks, dtype=torch.float64).index_add_(0, layers, metrics)
        metrics = (sums / torch.bincount(layers, minlength=blocks))[layers]
    low, high = float(metrics.min()), float(metrics.max())
    if high - low <= EQUAL * max(abs(low), abs(high)):
        return torch.full_like(metrics, target)
    shares = (metrics - low) / (high - low) * (2 * epsilon) + (1 - epsilon)
    scale = float((weights * shares).sum())
    if scale <= 0:
        raise OptionError(f"--epsilon {epsilon:g} leaves no mean sparsity to scale; give 1 or less.")
    return shares * (target * float(weights.sum()) / scale)
