"""The dense target: weights that give on the pruned model's inputs what dense ones give on the dense model's inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

from trimcli.methods.heldout import Judged, error
from trimcli.methods.stats import CROSS, FITTING, LinearStats
from trimcli.methods.updates.obs_solver import factorise

# How far towards the dense target, of which held-out samples choose, or none of it: all the way ruins some models.
SHARES = (0.25, 0.5, 0.75, 1.0)


def dense_target(weight: Tensor, stats: LinearStats, ridge: float) -> Tensor:
    """The dense weights W', float32 [D_out, D_in], of least ||W' X - W Z||^2 + r ||W' - W||^2.

    X: the pruned model's inputs, Z: the dense one's. ridge: r over the mean of the diagonal of X's Gram; ten times as
    much, and so on, where that Gram cannot be factorised. Raises what `factorise` raises.
    """
    return weight + weight @ stats.once(("dense target", ridge), lambda whole: _shift(whole, ridge))


def _shift(stats: LinearStats, ridge: float) -> Tensor:
    """(C - G) (G + r I)^-1, float32 [D_in, D_in], G the Gram of X, C the cross Gram of Z and X."""
    gram, cross = stats[FITTING].double(), stats[CROSS].double()
    upper = factorise(gram, ridge).upper.double()
    return ((cross - gram) @ upper.T @ upper).float()


@torch.no_grad()
def aimed(
    weight: Tensor, found: Tensor, stats: LinearStats, ridge: float, fit: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Judged]:
    """Sparse weights between `found`, fitted to `weight`, and those fitted to the dense target, by held-out samples.

    Fits are linear in what is fitted to, so that between them lie the fits to what lies between the targets.
    """
    other = fit(dense_target(weight, stats, ridge))
    errors = {share: error(weight, torch.lerp(found, other, share), stats) for share in SHARES}
    share = min(errors, key=errors.__getitem__)
    judged = Judged("dense target", error(weight, found, stats), errors[share])
    return (torch.lerp(found, other, share) if judged.better else found), judged
