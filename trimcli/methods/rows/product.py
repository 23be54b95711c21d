"""Outputs of one pruned matrix at many row counts, each found from the one before where that is quicker."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from trimcli.methods.masks import keep_from_ranks
from trimcli.methods.ranking import ranks_of, row_blocks, row_order
from trimcli.methods.rows.quality import Dense, Outputs, compare

# Share of a block's weights that may change before multiplying the block anew is quicker: measured on two x86 cores, at
# 4096 x 4096 with 256 samples, somewhere between a third and a half.
_UPDATE_SHARE = 0.3
# Share of a matrix's weights that may change before the update goes by blocks of rows, to keep temporaries small.
_WHOLE_SHARE = 0.06


class State(NamedTuple):
    """Outputs at given row counts. counts: int64 [D_out] on the CPU, the weights that go from each row."""

    counts: Tensor
    outputs: Outputs


class Product:
    """B = P V, float32, for one matrix at any row counts, P the weight without the counts[k] lowest scores of row k.

    weight, scores: float [D_out, D_in]; inputs: float [D_in, N]. On a CPU the columns between the old and the new count
    are added or taken away. Raises ValueError for NaN scores.
    """

    def __init__(self, weight: Tensor, scores: Tensor, inputs: Tensor) -> None:
        self.d_out, self.d_in = weight.shape
        self._weight = weight.float().contiguous()
        self._inputs = inputs.float().contiguous()
        order = row_order(scores)
        self.ranks = ranks_of(order)
        self._order = order if weight.device.type == "cpu" else None
        self._dense = Dense(self._outputs(None, None))

    def at(self, counts: Tensor, near: State | None = None) -> State:
        """Outputs at `counts`, int64 [D_out] on the CPU. near: a state of this product to start from."""
        if near is not None and torch.equal(counts, near.counts):
            return near
        return State(counts, compare(self._dense, self._outputs(counts, near)))

    def _outputs(self, counts: Tensor | None, near: State | None) -> Tensor:
        """Outputs at `counts` or, without, the dense ones; in the same blocks, so counts of 0 give these."""
        outputs = self._weight.new_empty((self.d_out, self._inputs.shape[1]))
        blocks = list(row_blocks(self._weight))
        if counts is not None:
            size = self._weight.numel()
            # Places in a block are counted in int32.
            if near and size < 2**31 and int((counts - near.counts).abs().sum()) <= _WHOLE_SHARE * size:
                blocks = [slice(0, self.d_out)]
            counts = counts.to(self.ranks.device)  # one copy rather than one a block
        for rows in blocks:
            kept = self._weight[rows]
            if counts is not None:
                if near is not None and self._update(rows, counts[rows], near, outputs[rows]):
                    continue
                kept = kept * keep_from_ranks(self.ranks[rows], counts[rows])
            torch.mm(kept, self._inputs, out=outputs[rows])
        return outputs

    def _update(self, rows: slice, counts: Tensor, near: State, out: Tensor) -> bool:
        """Write the outputs of `rows` by what changes from `near`; False where that is not worth it."""
        if self._order is None:
            return False
        order, weight = self._order[rows].flatten(), self._weight[rows].flatten()
        old = near.counts[rows]
        changes = (counts - old).abs()
        ends = changes.cumsum(0)
        total = int(ends[-1])
        if total > _UPDATE_SHARE * order.numel():
            return False
        # Changed weight p belongs to the row with begin <= p < end and has rank p - begin + the lower count.
        begins = ends - changes
        first = torch.arange(len(counts)) * self.d_in
        places = torch.arange(total, dtype=torch.int32)
        places += (first + counts.minimum(old) - begins).int().repeat_interleave(changes)
        columns = order.index_select(0, places).int()
        values = weight.index_select(0, columns + first.int().repeat_interleave(changes))
        change = embedding_bag(columns, self._inputs, begins.int(), mode="sum", per_sample_weights=values)
        torch.addcmul(near.outputs.pruned[rows], change, (old - counts).sign().float().unsqueeze(1), out=out)
        return True
