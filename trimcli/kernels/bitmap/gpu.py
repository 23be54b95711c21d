"""The operator `trimcli::bitmap_linear` on CUDA devices, in Triton. Only this module imports triton.

A program takes blocks of rows and bytes of keep bits. Prefix sums of the bits set in each byte say where the kept
values of a byte begin; from there its eight weights are gathered one after another, zero where a bit is not set.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

MOST_COLUMNS = 16
# From so many columns on, 16-bit products are tensor cores' work.
DOTTED_COLUMNS = 5
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Blocks(NamedTuple):
    """What a program works on at a time: so many rows, so many bytes of each, by so many warps of 32 threads."""

    rows: int
    bytes: int
    warps: int


DECODED = Blocks(4, 32, 1)


def product_blocks(rows: int, columns: int) -> Blocks:
    """The blocks for a matrix of so many rows times so many columns without tensor cores, as an H100 likes them best.

    Where there are fewer rows than it runs programs at once, more warps share one.
    """
    if columns > 4:
        return Blocks(1, 32, 1)
    return Blocks(1, 64, 1) if rows >= 1024 else Blocks(1, 512, 4)


def dotted_blocks(rows: int) -> Blocks:
    """The same for tensor cores, which take 16 rows and no fewer."""
    return Blocks(16, 16, 1) if rows >= 8192 else Blocks(16, 32, 4)


def multiply(inputs: Tensor, keep: Tensor, offsets: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """Inputs [n, D_in] -> outputs [n, D_out] of the same dtype; `operator.bitmap_linear` says what the others are.

    Nothing is waited for: what lies in the tensors, the row offsets among it, is not looked at. Raises RuntimeError
    where dtypes and shapes do not go together.
    """
    _check(inputs, keep, offsets, values, bias)
    if len(inputs) > MOST_COLUMNS:
        dtype = torch.promote_types(inputs.dtype, values.dtype)
        weight = decoded(keep, offsets, values, inputs.shape[1], dtype)
        added = None if bias is None else bias.to(dtype)
        return nn.functional.linear(inputs.to(dtype), weight, added).to(inputs.dtype)
    n, rows = len(inputs), len(keep)
    outputs = inputs.new_empty(n, rows)
    if outputs.numel() == 0:
        return outputs
    dotted = n >= DOTTED_COLUMNS and inputs.dtype == values.dtype != torch.float32
    blocks = dotted_blocks(rows) if dotted else product_blocks(rows, n)
    kernel, columns = (_dotted, MOST_COLUMNS) if dotted else (_few, triton.next_power_of_2(n))
    given = (inputs.contiguous(), keep, offsets, values, bias, outputs, n, rows, inputs.shape[1], keep.shape[1])
    kernel[(triton.cdiv(rows, blocks.rows),)](*given, columns, blocks.rows, blocks.bytes, num_warps=blocks.warps)
    return outputs


def decoded(keep: Tensor, offsets: Tensor, values: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix [D_out, D_in] of keep bits and kept values in `dtype`, on their device."""
    rows, row_bytes = keep.shape
    found = values.new_empty(rows, columns, dtype=dtype)
    if found.numel():
        given = (keep, offsets, values, found, rows, columns, row_bytes, DECODED.rows, DECODED.bytes)
        _decode[(triton.cdiv(rows, DECODED.rows),)](*given, num_warps=DECODED.warps)
    return found


def _check(inputs: Tensor, keep: Tensor, offsets: Tensor, values: Tensor, bias: Tensor | None) -> None:
    """As the CPU's operator does, but for what lies in the tensors."""
    rows = len(keep)
    if inputs.dim() != 2:
        raise RuntimeError(f"inputs are [n, D_in], not of {inputs.dim()} dimensions")
    bits = (rows, -(-inputs.shape[1] // 8))
    if keep.dtype != torch.uint8 or not keep.is_contiguous() or keep.shape != bits:
        raise RuntimeError("keep bits are uint8 [D_out, ceil(D_in / 8)]")
    if offsets.dtype != torch.int64 or not offsets.is_contiguous() or offsets.shape != (rows + 1,):
        raise RuntimeError("row offsets are int64 [D_out + 1]")
    if values.dim() != 1 or not values.is_contiguous():
        raise RuntimeError("kept values are contiguous, of one dimension")
    if values.dtype not in FLOATS:
        raise RuntimeError(f"kept values are float32, bfloat16 or float16, not {values.dtype}")
    if bias is not None and (bias.shape != (rows,) or not bias.is_contiguous()):
        raise RuntimeError("the bias is [D_out]")
    for one in (keep, offsets, values, *(() if bias is None else (bias,))):
        if one.device != inputs.device:
            raise RuntimeError(f"inputs are on {inputs.device}, and the packed matrix is on {one.device}")


@triton.jit(do_not_specialize=["n", "rows"])
def _few(
    inputs,
    keep,
    offsets,
    values,
    bias,
    outputs,
    n,
    rows,
    columns,
    row_bytes,
    block_n: tl.constexpr,
    block_rows: tl.constexpr,
    block_bytes: tl.constexpr,
):
    """Outputs [n, rows] of inputs [n, columns], float32 sums of every thread's own products."""
    row, token = tl.program_id(0) * block_rows + tl.arange(0, block_rows), tl.arange(0, block_n)
    start = values + tl.load(offsets + row, mask=row < rows, other=0)
    sums = tl.zeros([block_n, block_rows, block_bytes], tl.float32)
    for first in range(0, row_bytes, block_bytes):
        bits, place, start = _places(keep, row, start, first, rows, row_bytes, block_bytes)
        x = _inputs(inputs, token, first, n, columns, block_bytes).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, [block_n, block_bytes, 2, 2, 2]))
        # One pair a line: Triton takes no nested targets.
        x04, x26 = tl.split(even)
        x15, x37 = tl.split(odd)
        x0, x4 = tl.split(x04)
        x2, x6 = tl.split(x26)
        x1, x5 = tl.split(x15)
        x3, x7 = tl.split(x37)
        sums, place = _added(sums, x0, place, bits, 7)
        sums, place = _added(sums, x1, place, bits, 6)
        sums, place = _added(sums, x2, place, bits, 5)
        sums, place = _added(sums, x3, place, bits, 4)
        sums, place = _added(sums, x4, place, bits, 3)
        sums, place = _added(sums, x5, place, bits, 2)
        sums, place = _added(sums, x6, place, bits, 1)
        sums, place = _added(sums, x7, place, bits, 0)
    _store(outputs, tl.sum(sums, 2), bias, token, row, n, rows)


@triton.jit(do_not_specialize=["n", "rows"])
def _dotted(
    inputs,
    keep,
    offsets,
    values,
    bias,
    outputs,
    n,
    rows,
    columns,
    row_bytes,
    block_n: tl.constexpr,
    block_rows: tl.constexpr,
    block_bytes: tl.constexpr,
):
    """The same by products of blocks; inputs and values are of one 16-bit dtype."""
    row, token = tl.program_id(0) * block_rows + tl.arange(0, block_rows), tl.arange(0, block_n)
    start = values + tl.load(offsets + row, mask=row < rows, other=0)
    sums = tl.zeros([block_n, block_rows], tl.float32)
    for first in range(0, row_bytes, block_bytes):
        bits, place, start = _places(keep, row, start, first, rows, row_bytes, block_bytes)
        x = _inputs(inputs, token, first, n, columns, block_bytes)
        sums = tl.dot(x, tl.trans(_weights(place, bits, block_rows, block_bytes)), sums)
    _store(outputs, sums, bias, token, row, n, rows)


@triton.jit(do_not_specialize=["rows"])
def _decode(
    keep, offsets, values, found, rows, columns, row_bytes, block_rows: tl.constexpr, block_bytes: tl.constexpr
):
    """The matrix [rows, columns]."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    start = values + tl.load(offsets + row, mask=row < rows, other=0)
    for first in range(0, row_bytes, block_bytes):
        bits, place, start = _places(keep, row, start, first, rows, row_bytes, block_bytes)
        column = first * 8 + tl.arange(0, 8 * block_bytes)
        there = (row < rows)[:, None] & (column < columns)[None, :]
        to = found + row[:, None].to(tl.int64) * columns + column[None, :]
        tl.store(to, _weights(place, bits, block_rows, block_bytes), mask=there)


@triton.jit
def _places(keep, row, start, first, rows, row_bytes, block_bytes: tl.constexpr):
    """Keep bits [rows, bytes] from byte `first` on, where each byte's kept values begin, and the next block's.

    start: where the block's kept values begin [rows].
    """
    byte = first + tl.arange(0, block_bytes)
    there = (row < rows)[:, None] & (byte < row_bytes)[None, :]
    # Neighbouring bytes belong to neighbouring threads, which then read neighbouring values.
    at = tl.max_contiguous(keep + row[:, None].to(tl.int64) * row_bytes + byte[None, :], [1, 1])
    bits = tl.load(at, mask=there, other=0).to(tl.int32)
    pairs = bits - ((bits >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    counts = (fours + (fours >> 4)) & 0xF
    return bits, start[:, None] + (tl.cumsum(counts, 1) - counts), start + tl.sum(counts, 1)


@triton.jit
def _weight(place, bits, bit: tl.constexpr):
    """The weight of one bit of every byte, at `place` where it is set, and where the next one is."""
    return tl.load(place, mask=(bits & (1 << bit)) != 0, other=0), place + ((bits >> bit) & 1)


@triton.jit
def _added(sums, x, place, bits, bit: tl.constexpr):
    """Sums [n, rows, bytes] and the products of one bit's weights with its inputs [n, bytes]; the next places."""
    weight, place = _weight(place, bits, bit)
    return sums + weight.to(tl.float32)[None, :, :] * x[:, None, :], place


@triton.jit
def _weights(place, bits, block_rows: tl.constexpr, block_bytes: tl.constexpr):
    """All weights of a block [rows, 8 * bytes], in their order."""
    w0, place = _weight(place, bits, 7)
    w1, place = _weight(place, bits, 6)
    w2, place = _weight(place, bits, 5)
    w3, place = _weight(place, bits, 4)
    w4, place = _weight(place, bits, 3)
    w5, place = _weight(place, bits, 2)
    w6, place = _weight(place, bits, 1)
    w7, place = _weight(place, bits, 0)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), [block_rows, 8 * block_bytes])


@triton.jit
def _inputs(inputs, token, first, n, columns, block_bytes: tl.constexpr):
    """Inputs [n, 8 * bytes] from byte `first` on, zero beyond the columns."""
    column = first * 8 + tl.arange(0, 8 * block_bytes)
    there = (token < n)[:, None] & (column < columns)[None, :]
    return tl.load(inputs + token[:, None] * columns + column[None, :], mask=there, other=0)


@triton.jit
def _store(outputs, sums, bias, token, row, n, rows):
    """Write sums [n, rows], with the bias where there is one."""
    if bias is not None:
        sums += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)[None, :]
    there = (token < n)[:, None] & (row < rows)[None, :]
    tl.store(outputs + token[:, None] * rows + row[None, :], sums, mask=there)
