"""The arithmetic of ADMM for one matrix: dense weights that fit, sparse ones that are allowed, drawn together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimcli.methods.choice import Choice
from trimcli.methods.stats import FITTING, LinearStats

# rho grows by so much when this share of the support changed since the last look (Meng et al. 2024, section 3.2).
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
# By then the two are one in float32, and more would leave its range.
LARGEST_RHO = 1e6


@dataclass(frozen=True)
class Spectrum:
    """A Gram scaled to unit diagonal, with its ridge: values [D_in], vectors [D_in, D_in], float32. scale: [D_in]."""

    scale: Tensor
    scaled: Tensor
    values: Tensor
    vectors: Tensor


def spectrum_of(stats: LinearStats, ridge: float) -> Spectrum:
    """The spectrum of a linear's Gram; linears that share an input share it."""
    return stats.once(("spectrum", ridge), lambda whole: _spectrum(whole[FITTING], ridge))


def _spectrum(gram: Tensor, ridge: float) -> Spectrum:
    diagonal = gram.diagonal().float()
    scale = (diagonal + ridge * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
    scaled = gram.float() / scale / scale.unsqueeze(1)
    scaled.diagonal().fill_(1.0)
    values, vectors = torch.linalg.eigh(scaled)
    return Spectrum(scale, scaled, values.clamp(min=0), vectors)


@torch.no_grad()
def alternated(weight: Tensor, choice: Choice, *, ridge: float, steps: int) -> tuple[Tensor, Tensor]:
    """The mask that ADMM ends with, bool [D_out, D_in], and its sparse weights, float32, where they stand.

    weight: W, float32 [D_out, D_in]. In coordinates in which the Gram G has unit diagonal, so that a magnitude is what
    a weight matters: B = (W G + rho (D - U)) (G + rho I)^-1 fits, D is what stays of B + U, its largest, U += B - D.
    What goes grows to its full count with the cube of the first half of the steps; then rho grows as the mask settles.
    """
    spectrum = spectrum_of(choice.stats, ridge)
    dense = weight * spectrum.scale
    fits = dense @ spectrum.scaled
    sparse, dual = dense.clone(), torch.zeros_like(dense)
    rho, ramp = 1.0, max(1, steps // 2)
    keep = torch.ones_like(weight, dtype=torch.bool)
    for step in range(1, steps + 1):
        turned = (fits + rho * (sparse - dual)) @ spectrum.vectors
        found = turned.div_(spectrum.values + rho) @ spectrum.vectors.T
        share = 1 - (1 - min(step / ramp, 1)) ** 3
        before, keep = keep, choice.of_scores((found + dual).abs_(), share)
        sparse = (found + dual) * keep
        dual += found - sparse
        if step > ramp:
            changed = float((before != keep).sum()) / max(1, int(keep.sum()))
            rho = min(LARGEST_RHO, rho * next(growth for least, growth in GROWTH if changed >= least))
    return keep, sparse / spectrum.scale
