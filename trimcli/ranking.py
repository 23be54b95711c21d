"""The order of every row's scores, found once and used by whatever prunes row by row."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

# Rows are worked through in blocks of about so many scores: small enough for a core's caches, but an
# accelerator is kept busy only by large ones.
_BLOCK = 1 << 18
_ACCELERATOR_BLOCK = 1 << 22


def row_order(scores: Tensor) -> Tensor:
    """Columns of every row by ascending score, equal scores in index order.

    scores: float [D_out, D_in]. Returns [D_out, D_in] on their device, int16 where it can hold D_in, int32
    else. Raises ValueError for NaN scores.
    """
    d_out, d_in = scores.shape
    if scores.numel() and scores.max().isnan():
        raise ValueError("the scores hold NaN; the weights or the statistics they come from are damaged.")
    dtype = torch.int16 if d_in <= torch.iinfo(torch.int16).max else torch.int32
    order = torch.empty((d_out, d_in), dtype=dtype, device=scores.device)
    packable = scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float16, torch.bfloat16)
    step = _rows_at_once(scores)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, d_out, step):
            block = scores[start : start + step]
            if packable:
                order[start : start + step] = _packed_order(block, pool, threads)
            else:
                order[start : start + step] = block.argsort(dim=1, stable=True)
    return order


def ranks_of(order: Tensor) -> Tensor:
    """The rank of every column in its row: the inverse of each row's permutation.

    order: int16 or int32 [D_out, D_in]. Returns the like.
    """
    d_out, d_in = order.shape
    ranks = torch.empty_like(order)
    ascending = torch.arange(d_in, dtype=order.dtype, device=order.device)
    step = _rows_at_once(order)
    for start in range(0, d_out, step):
        block = order[start : start + step]
        ranks[start : start + step].scatter_(1, block.long(), ascending.expand_as(block))
    return ranks


def _rows_at_once(matrix: Tensor) -> int:
    block = _BLOCK if matrix.device.type == "cpu" else _ACCELERATOR_BLOCK
    return max(1, block // max(matrix.shape[1], 1))


def _packed_order(scores: Tensor, pool: ThreadPoolExecutor, threads: int) -> Tensor:
    """Columns by ascending score as int64, by sorting score and column packed into one integer.

    No two of these are equal, so numpy's vectorised sort, which is not stable, gives the stable order in a
    fifth of the time of torch's.
    """
    # Adding zero turns -0.0, which equals 0.0 but has other bits, into 0.0.
    bits = (scores.float() + 0.0).view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    packed = bits.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(scores.shape[1]))
    # The parts are views, sorted in place; numpy releases the interpreter meanwhile.
    list(pool.map(lambda part: part.sort(axis=1), np.array_split(packed.numpy(), threads)))
    return packed.bitwise_and_(0xFFFFFFFF)
