"""The order of every row's scores, found once and used by whatever prunes row by row."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from trimcli.methods.masks import refuse_nan, slices

_SMALLEST_BLOCK = 1 << 16


def row_order(scores: Tensor) -> Tensor:
    """Columns of every row by ascending score, ties in index order, int16 or int32. Raises ValueError for NaN."""
    if scores.numel():
        refuse_nan(scores)
    dtype = torch.int16 if scores.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
    order = torch.empty_like(scores, dtype=dtype, memory_format=torch.contiguous_format)
    packable = scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float16, torch.bfloat16)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for rows in row_blocks(scores):
            if packable:
                order[rows] = _packed_order(scores[rows], pool, threads)
            else:
                order[rows] = scores[rows].argsort(dim=1, stable=True)
    return order


def ranks_of(order: Tensor) -> Tensor:
    """The rank of every column in its row: the inverse of each row's permutation. order: int [D_out, D_in]."""
    ranks = torch.empty_like(order)
    ascending = torch.arange(order.shape[1], dtype=order.dtype, device=order.device)
    for rows in row_blocks(order):
        ranks[rows].scatter_(1, order[rows].long(), ascending.expand_as(order[rows]))
    return ranks


def row_blocks(matrix: Tensor, parts: int = 8) -> Iterator[slice]:
    """Slices that together are all rows of a matrix, about `parts` of them, fewer where they would get small."""
    d_out, width = matrix.shape
    return slices(d_out, max(-(-d_out // parts), _SMALLEST_BLOCK // max(width, 1), 1))


def _packed_order(scores: Tensor, pool: ThreadPoolExecutor, threads: int) -> Tensor:
    """Columns by ascending score as int64: score and column packed into one integer, of which no two are equal."""
    # Adding zero turns -0.0, which equals 0.0 but has other bits, into 0.0.
    bits = (scores.float() + 0.0).view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    packed = bits.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(scores.shape[1]))
    # The parts are views, sorted in place; numpy releases the interpreter meanwhile.
    list(pool.map(lambda part: part.sort(axis=1), np.array_split(packed.numpy(), threads)))
    return packed.bitwise_and_(0xFFFFFFFF)
