"""Products with weights in tiles of bfloat16 (AMX), and what is done to their results before they are written.

Every number of a result is summed in the same order whatever the number of rows and wherever the row stands.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from lpa_model.kernels import tiles
from lpa_model.kernels.machine import ZERO, address, compiled, exp, narrow, prefetch_rows, widen
from lpa_model.kernels.records import ADDED, GATED, RELU

ROWS = 32  # of x that meet two strips of weights at a time
CHUNK = 256  # rows of one item: what stays in a core's second-level cache with the strips
STRIP = 16  # outputs side by side in a tile
PAIR = 2 * STRIP
AHEAD = 4096  # bytes of a strip asked for ahead of the product


@compiled
def items(op, rows):
    """How many pieces of work the product has: pairs of strips times chunks of rows."""
    return op.strips // 2 * -(-rows // CHUNK)


@compiled
def prepare(op, rows, room, like):
    """Copy the rows of a last block that is not full: tiles are read whole, and what lies behind may be no memory."""
    width = op.width * (op.strips // op.group_strips)
    first = rows // ROWS * ROWS
    for row in range(first, rows):
        room.rows[row - first, :width] = carray(address(op.x + row * op.x_stride, like), (width,))


@compiled
def work(op, rows, item, room, like):
    """One pair of strips for one chunk of rows."""
    chunks = -(-rows // CHUNK)
    pair, chunk = item // chunks, item % chunks
    x = op.x + 2 * (2 * pair // op.group_strips) * op.width
    depth = op.width // 32
    weight = op.weight + pair * 2 * depth * 1024
    for row in range(chunk * CHUNK, min((chunk + 1) * CHUNK, rows), ROWS):
        count = min(ROWS, rows - row)
        source, stride = x + row * op.x_stride, op.x_stride
        if count < ROWS:
            source, stride = room.rows.ctypes.data + (x - op.x), room.rows.strides[0]
        _multiply(source, stride, weight, depth, count, row == chunk * CHUNK, room.sums.ctypes.data)
        _finish(op, row, count, pair, room.sums, like)


@compiled
def _multiply(x, stride, weight, depth, count, cold, sums):
    """x [count <= 32, 32 * depth] times two strips at `weight` -> float32 [count, 32] at `sums`.

    `cold`: the strips have not been read a moment ago.
    """
    other, both = weight + 1024 * depth, count > STRIP
    tiles.zero(0)
    tiles.zero(1)
    tiles.zero(2)
    tiles.zero(3)
    for i in range(depth):
        if cold:
            prefetch_rows(weight + 1024 * i + AHEAD, 0, 1, 1024)
            prefetch_rows(other + 1024 * i + AHEAD, 0, 1, 1024)
        tiles.load(4, x + 64 * i, stride)
        tiles.load(5, weight + 1024 * i, 64)
        tiles.multiply(0, 4, 5)
        if both:
            tiles.load(7, x + 64 * i + STRIP * stride, stride)
            tiles.multiply(2, 7, 5)
        tiles.load(6, other + 1024 * i, 64)
        tiles.multiply(1, 4, 6)
        if both:
            tiles.multiply(3, 7, 6)
    tiles.store(0, sums, 4 * PAIR)
    tiles.store(1, sums + 64, 4 * PAIR)
    if both:
        tiles.store(2, sums + STRIP * 4 * PAIR, 4 * PAIR)
        tiles.store(3, sums + STRIP * 4 * PAIR + 64, 4 * PAIR)


@compiled
def _finish(op, row, count, pair, sums, like):
    """Sums [count, 32] of a pair of strips, and the bias, to the output's rows from `row` on."""
    if op.bias:
        bias = carray(address(op.bias + 2 * PAIR * pair, like), (PAIR,))
        for r in range(count):
            for j in range(PAIR):
                sums[r, j] += widen(bias[j])
    for r in range(count):
        found = sums[r]
        if op.then == GATED:  # a strip of gates and one of what they let through
            out = carray(address(op.out + (row + r) * op.out_stride + 2 * STRIP * pair, like), (STRIP,))
            for j in range(STRIP):
                out[j] = narrow(_silu(found[j]) * found[STRIP + j], like)
        elif op.then == ADDED:
            wide = carray(address(op.out + (row + r) * op.out_stride + 4 * PAIR * pair, ZERO), (PAIR,))
            for j in range(PAIR):  # rounded first, as when it is written down
                wide[j] += widen(narrow(found[j], like))
        else:
            out = carray(address(op.out + (row + r) * op.out_stride + 2 * PAIR * pair, like), (PAIR,))
            if op.then == RELU:
                for j in range(PAIR):
                    out[j] = narrow(max(found[j], ZERO), like)
            else:
                for j in range(PAIR):
                    out[j] = narrow(found[j], like)


@compiled
def _silu(x):
    e = exp(-abs(x))
    return x * (np.float32(1) if x >= 0 else e) / (np.float32(1) + e)
