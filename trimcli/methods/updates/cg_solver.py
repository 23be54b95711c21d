"""The best weights under a mask: least squares in the metric of a Gram, by preconditioned conjugate gradients."""

import torch
from torch import Tensor

# Steps between looks at whether every row has arrived, for each of which the host waits for an accelerator.
LOOK, ARRIVED = 10, 1e-5


@torch.no_grad()
def fitted(
    weight: Tensor, keep: Tensor, gram: Tensor, *, ridge: float, steps: int, start: Tensor | None = None
) -> Tensor:
    """The B, zero outside `keep`, of least tr((B - W) (G + r I) (B - W)^T), float32 [D_out, D_in].

    weight: W, float32 [D_out, D_in]. keep: bool likewise. gram: G, [D_in, D_in], symmetric, positive semidefinite.
    ridge: r over the mean of G's diagonal. start: where the search begins, W under the mask if not given. All rows at
    once, each with its own step lengths, preconditioned by the diagonal (Jacobi). Raises ValueError for other shapes.
    """
    if keep.shape != weight.shape or gram.shape != (weight.shape[1], weight.shape[1]):
        shapes = ", ".join(str(list(one.shape)) for one in (weight, keep, gram))
        raise ValueError(f"weight, keep and Gram {shapes} do not fit [D_out, D_in], the same, and [D_in, D_in].")
    diagonal = gram.diagonal().double()
    added = float(ridge * diagonal.mean()) or 1.0  # where no channel ever fires, any will do
    scale = (diagonal + added).to(weight.dtype)

    def applied(rows: Tensor) -> Tensor:
        return (rows @ gram.to(rows.dtype)).add_(rows, alpha=added).mul_(keep)

    found = (weight if start is None else start) * keep
    residual = ((weight - found) @ gram.to(weight.dtype)).add_(weight - found, alpha=added).mul_(keep)
    towards = residual / scale
    direction = towards.clone()
    slope = (residual * towards).sum(dim=1, keepdim=True)
    first = slope.clone()
    for step in range(1, steps + 1):
        product = applied(direction)
        length = slope / (direction * product).sum(dim=1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
        found.addcmul_(direction, length)
        residual.addcmul_(product, length, value=-1)
        if step % LOOK == 0 and bool((slope <= ARRIVED**2 * first).all()):
            break
        towards = residual / scale
        before, slope = slope, (residual * towards).sum(dim=1, keepdim=True)
        direction.mul_(slope / before.clamp(min=torch.finfo(slope.dtype).tiny)).add_(towards)
    return found
