"""How far a model is from the dense one under several candidate sparsities, all in one walk through its layers.

A trial prunes by wanda on the dense model's statistics, whatever the prune to come will do: it is cheap, and ranks
allocations. One decoder layer is resident, and beside it a dense copy of its matrices, their masks as bits, and the
hidden states of every candidate.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from trimcli.console import NO_PROGRESS, Progress
from trimcli.methods import masks
from trimcli.methods.divergence import divergence
from trimcli.methods.scores import wanda
from trimcli.methods.stats import LinearStats
from trimcli.model.device import held_logits
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import DecoderLayer, Skeleton
from trimcli.pipeline.stream import Logits
from trimcli.pipeline.walk import Walk, batch_of, own_samples
from trimcli.world import current


def divergences(
    skeleton: Skeleton,
    candidates: Sequence[Mapping[str, float]],
    stats: Callable[[str], LinearStats],
    tokens: Tensor,
    *,
    progress: Progress = NO_PROGRESS,
) -> list[float]:
    """Mean KL divergence of each candidate's predictions from the dense model's, in nats a token.

    candidates: sparsity by linear, all of the same linears; the others stay dense. stats: square norms of dense inputs.
    tokens: integer [n, L], of which every rank tries its share. The skeleton is proven. Raises InputError where a
    layer's outputs are not finite.
    """
    everyone, tokens = tokens.numel(), own_samples(tokens)
    count = len(tokens)
    most = batch_of(skeleton, *tokens.shape)
    # Batches that do not reach from one candidate into the next.
    size = next(size for size in range(most, 0, -1) if count % size == 0)
    walk = Walk(skeleton, tokens.repeat(1 + len(candidates), 1), batch_size=size)
    dense, *blocks = masks.slices(walk.nsamples, count)
    with progress.task("trying", len(skeleton.layers) + count) as step:
        for layer in walk.layers():
            walk.advance(layer, rows=dense)
            _try_layer(walk, layer, candidates, stats, blocks)
            step()
        total = torch.zeros(len(candidates), dtype=torch.float64, device=skeleton.device)
        with walk.head() as head:
            for sample in range(count):
                total += _sample(head, sample, [block.start + sample for block in blocks], tokens.shape[1])
                step()
    return (current().summed(total) / everyone).tolist()


def _try_layer(
    walk: Walk,
    layer: DecoderLayer,
    candidates: Sequence[Mapping[str, float]],
    stats: Callable[[str], LinearStats],
    blocks: Sequence[slice],
) -> None:
    """Run each candidate's samples through the loaded layer as the candidate prunes it."""
    mine = [one for one in layer.linears if one.name in candidates[0]]
    kept = {one.name: one.weight.clone() for one in mine}
    bits = {one.name: _masks(walk.skeleton, one, stats(one.name), candidates) for one in mine}
    for block, candidate in zip(blocks, candidates, strict=True):
        for one in mine:
            one.write(kept[one.name], masks.unpack(bits[one.name][candidate[one.name]], one.d_in))
        walk.advance(layer, rows=block)


def _masks(
    skeleton: Skeleton, linear: Matrix, stats: LinearStats, candidates: Sequence[Mapping[str, float]]
) -> dict[float, Tensor]:
    """The packed mask of each sparsity that any candidate gives the linear: wanda's, rows even."""
    scores = wanda(linear.read(skeleton.checkpoint).to(skeleton.device), stats)
    masks.refuse_nan(scores)
    ordered = masks.sort_rows(scores)
    found = {}
    for sparsity in {candidate[linear.name] for candidate in candidates}:
        counts = masks.even_row_counts(*linear.shape, sparsity, "exact", skeleton.device)
        found[sparsity] = masks.pack(masks.split_rows(scores, masks.row_thresholds(ordered, counts), counts))
    return found


def _sample(head: Logits, dense: int, others: Sequence[int], length: int) -> Tensor:
    """Summed KL divergence over the positions of one sample from the row `dense`, float64 [len(others)]."""
    wanted = head(slice(dense, dense + 1), slice(0, length))
    parts = list(masks.slices(length, max(1, held_logits(wanted.device) // wanted.shape[-1])))
    found = torch.zeros(len(others), dtype=torch.float64, device=wanted.device)
    for place, row in enumerate(others):  # a suspended pass's logits are there until another's are asked for
        for part in parts:
            found[place] += divergence(wanted[:, part], head(slice(row, row + 1), part)).sum(dtype=torch.float64)
    return found
