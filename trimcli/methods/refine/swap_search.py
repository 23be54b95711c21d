"""The search for swaps: the best one of every row at a time, all rows at once."""

import torch
from torch import Tensor

from trimcli.methods.masks import slices

# A pair is looked for among so many weights that alone would cost least, and as many that would bring most.
CANDIDATES = 8
# Swaps of a row: at most this share of its weights.
SHARE = 0.25
# Swaps between looks at which rows are still at it, for each of which the host waits for an accelerator.
LOOK = 10
# What a swap must bring, relative to the row's first error: less is float32's rounding.
LEAST = 1e-6
# Weights of the rows that are worked on together.
BLOCK = 1 << 22


@torch.no_grad()
def search(
    weight: Tensor,
    keep: Tensor,
    gram: Tensor,
    *,
    group: int | None = None,
    free: Tensor | None = None,
    candidates: int = CANDIDATES,
    share: float = SHARE,
) -> Tensor:
    """The keep mask after the swaps, bool [D_out, D_in], with as many weights in every row, or in every `group` of it.

    weight: float32 [D_out, D_in]. keep: bool likewise, where it starts. gram: [D_in, D_in]. free: bool [D_out, D_in],
    False for weights that may not return. share: of a row's weights, how many swaps it has at most. candidates: on
    either side; with a `group` all pairs are looked at. Raises ValueError for shapes that do not fit.
    """
    d_out, d_in = weight.shape
    if keep.shape != weight.shape or gram.shape != (d_in, d_in):
        shapes = ", ".join(str(list(one.shape)) for one in (weight, keep, gram))
        raise ValueError(f"weight, keep and Gram {shapes} do not fit [D_out, D_in], the same, and [D_in, D_in].")
    gram = gram.to(weight.dtype)
    allowed = torch.ones_like(keep) if free is None else free
    found, swaps = keep.clone(), max(1, round(share * d_in))
    for rows in slices(d_out, max(1, BLOCK // (d_in * (group or 1)))):
        found[rows] = _rows(weight[rows], keep[rows], gram, allowed[rows], group, min(candidates, d_in), swaps)
    return found


def _rows(
    weight: Tensor, keep: Tensor, gram: Tensor, allowed: Tensor, group: int | None, candidates: int, swaps: int
) -> Tensor:
    result = keep.clone()
    alone, gone = weight.square() * gram.diagonal(), weight * ~keep
    pulls = gone @ gram
    least = -LEAST * (gone * pulls).sum(dim=1)
    # What each weight alone adds to the error, infinite where it cannot go, or return: adding is faster than masking.
    going, coming = alone.masked_fill(~keep, torch.inf), alone.masked_fill_(keep | ~allowed, torch.inf)
    left = torch.arange(len(weight), device=weight.device)  # the rows still at it, as places in the result
    for step in range(1, swaps + 1):
        linear = 2 * weight * pulls
        costs, gains = going + linear, coming - linear
        if group is None:
            change, out, back = _among_candidates(weight, costs, gains, gram, candidates)
        else:
            change, out, back = _inside_groups(weight, costs, gains, gram, group)
        moves, rows = change < least, torch.arange(len(weight), device=weight.device)
        for place, source, target, sign in ((out, going, coming, 1), (back, coming, going, -1)):
            own = source[rows, place]
            target[rows, place] = torch.where(moves, own, target[rows, place])
            source[rows, place] = own.masked_fill(moves, torch.inf)
            pulls.addcmul_(gram.index_select(0, place), (weight[rows, place] * moves).unsqueeze(1), value=sign)
        if step % LOOK == 0 or step == swaps:
            result[left] = going.isfinite()
            if not bool(moves.any()):
                break
            left, weight, pulls, going = left[moves], weight[moves], pulls[moves], going[moves]
            coming, least = coming[moves], least[moves]
    return result


def _among_candidates(
    weight: Tensor, costs: Tensor, gains: Tensor, gram: Tensor, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best swap of every row [D_out] among the weights that alone cost least: its change, what goes, what comes."""
    cost, going = costs.topk(candidates, dim=1, largest=False, sorted=False)
    gain, coming = gains.topk(candidates, dim=1, largest=False, sorted=False)
    both = gram[going.unsqueeze(2), coming.unsqueeze(1)]
    both = both * weight.gather(1, going).unsqueeze(2) * weight.gather(1, coming).unsqueeze(1)
    change, place = (cost.unsqueeze(2) + gain.unsqueeze(1) - 2 * both).flatten(1).min(dim=1)
    first, second = place.div(candidates, rounding_mode="floor"), place % candidates
    rows = torch.arange(len(weight), device=weight.device)
    return change, going[rows, first], coming[rows, second]


def _inside_groups(
    weight: Tensor, costs: Tensor, gains: Tensor, gram: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same among all pairs of one group of consecutive inputs."""
    places = torch.arange(len(gram), device=gram.device).view(-1, group)
    inside = gram[places.unsqueeze(2), places.unsqueeze(1)]
    split = [one.unflatten(1, (-1, group)) for one in (weight, costs, gains)]
    both = split[0].unsqueeze(3) * split[0].unsqueeze(2) * inside
    changes = split[1].unsqueeze(3) + split[2].unsqueeze(2) - 2 * both
    change, place = changes.flatten(1).min(dim=1)
    start = place.div(group * group, rounding_mode="floor") * group
    pair = place % (group * group)
    return change, start + pair.div(group, rounding_mode="floor"), start + pair % group
