"""Products with weights of bfloat16, and what is done to their results before they are written.

Weights lie as tiles of AMX. Where `tiled` is None they are met in vectors, else in tiles by a thread that has them
configured. Every number of a result is summed in the same order whatever the number of rows and wherever a row is.
"""

from __future__ import annotations

from numba import carray

from lpa_model.backends.cpu.numba import paired, sums, tiles
from lpa_model.backends.cpu.numba.machine import ZERO, address, compiled, copy, prefetch_rows, widen
from lpa_model.backends.cpu.numba.records import ADDED, GATED, RELU

ROWS = 32  # of x that meet two strips of weights at a time
CHUNK = 256  # rows of one item: what stays in a core's second-level cache with the strips
GROUP = 8  # pairs of strips of one item, where there are many: threads that write side by side hinder each other
STRIP = 16  # outputs side by side in a tile
PAIR = 2 * STRIP
AHEAD = 4096  # bytes of a strip prefetched ahead of the product


@compiled
def _group(op, rows, tiled):
    """How many pairs of strips an item has: so few that there are items enough for all threads."""
    return 1 if rows <= ROWS and tiled is not None else min(GROUP, max(1, op.strips // 2 * -(-rows // CHUNK) // 8))


@compiled
def items(op, rows, tiled):
    """How many pieces of work the product has: groups of pairs of strips times chunks of rows."""
    return -(-(op.strips // 2) // _group(op, rows, tiled)) * -(-rows // CHUNK)


@compiled
def prepare(op, rows, room, like):
    """For tiles, copy the rows of a last block that is not full: they are read whole, and behind may be no memory."""
    width = op.width * (op.strips // op.group_strips)
    first = rows // ROWS * ROWS
    for row in range(first, rows):
        source, target = op.x + row * op.x_stride, room.rows + (row - first) * room.stride
        copy(source, target, width, like)


@compiled
def work(op, rows, item, room, like, tiled):
    """Some pairs of strips for one chunk of rows."""
    pairs, group = op.strips // 2, _group(op, rows, tiled)
    groups = -(-pairs // group)
    chunk, first = item // groups * CHUNK, item % groups * group
    depth, stride = op.width // 32, op.x_stride
    found, before = room.sums, room.sums + ROWS * 4 * PAIR
    last, left = 0, 0  # the row and the pair of what has been found before, and is not finished yet
    waiting = False
    lines = -(-2 * STRIP // max(1, (min(chunk + CHUNK, rows) - chunk) // ROWS))  # of the next strips, for each tile
    for pair in range(first, min(first + group, pairs)):
        part = 2 * (2 * pair // op.group_strips) * op.width
        weight = op.weight + pair * 2 * depth * 1024
        for row in range(chunk, min(chunk + CHUNK, rows), ROWS):
            count, x = min(ROWS, rows - row), op.x + row * stride + part
            if tiled is None or count < ROWS or rows == ROWS:  # a part of a block, or strips that are met only once
                if tiled is None:
                    paired.multiply_strips(x, stride, weight, depth, count, 2 * depth * 1024, found)
                else:
                    source, step = (x, stride) if count == ROWS else (room.rows + part, room.stride)
                    _multiply_some(source, step, weight, depth, count, row == chunk, found)
                _finish(op, row, count, pair, found, like)
            else:
                block = (row - chunk) // ROWS
                ahead = weight + 2 * depth * 1024 + block * depth * lines * 64
                if pair + 1 == min(first + group, pairs):
                    ahead = 0
                _multiply(x, stride, weight, depth, found, op, last, left, before if waiting else 0, ahead, lines, like)
                found, before, last, left, waiting = before, found, row, pair, True
    if waiting:
        _finish(op, last, ROWS, left, before, like)


@compiled
def _multiply(x, stride, weight, depth, found, op, row, pair, before, ahead, lines, like):
    """x [32, 32 * depth] times two strips at `weight` -> float32 [32, 32] at `found`; meanwhile `before`, the sums of
    another block, are finished, if that is not 0: tiles and vectors are worked on side by side. Of the strips that come
    next, `lines` lines at `ahead` are prefetched with each tile, if that is not 0.

    The strips are met again and again, and stay in the first-level cache if the rows do not pass through it.
    """
    other, share = weight + 1024 * depth, -(-ROWS // depth)
    tiles.zero_square()
    for i in range(depth):
        if ahead:
            prefetch_rows(ahead, i, 1, 64 * lines)
        tiles.stream(4, x + 64 * i, stride)
        tiles.load(5, weight + 1024 * i, 64)
        tiles.multiply(0, 4, 5)
        tiles.load(6, other + 1024 * i, 64)
        tiles.multiply(1, 4, 6)
        tiles.stream(7, x + 64 * i + STRIP * stride, stride)
        tiles.multiply(2, 7, 5)
        tiles.multiply(3, 7, 6)
        start = i * share
        if before and start < ROWS:
            _finish(op, row + start, min(share, ROWS - start), pair, before + start * 4 * PAIR, like)
    tiles.store_square(found, 4 * PAIR)


@compiled
def _multiply_some(x, stride, weight, depth, count, cold, found):
    """The same for fewer rows. `cold`: the strips have not been read a moment ago."""
    other, both = weight + 1024 * depth, count > STRIP
    tiles.zero_square()
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
    tiles.store(0, found, 4 * PAIR)
    tiles.store(1, found + 64, 4 * PAIR)
    if both:
        tiles.store(2, found + STRIP * 4 * PAIR, 4 * PAIR)
        tiles.store(3, found + STRIP * 4 * PAIR + 64, 4 * PAIR)


@compiled
def _finish(op, row, count, pair, found, like):
    """Sums [count, 32] of a pair of strips, and the bias, to the output's rows from `row` on."""
    if op.bias:
        bias = carray(address(op.bias + 2 * PAIR * pair, like), (PAIR,))
        rows = carray(address(found, ZERO), (count, PAIR))
        for r in range(count):
            for j in range(PAIR):
                rows[r, j] += widen(bias[j])
    out = op.out + row * op.out_stride
    if op.then == GATED:  # a strip of gates and one of what they let through
        sums.gated(found, count, out + 2 * STRIP * pair, op.out_stride)
    elif op.then == ADDED:
        sums.added(found, count, out + 4 * PAIR * pair, op.out_stride)
    elif op.then == RELU:
        sums.rectified(found, count, out + 2 * PAIR * pair, op.out_stride)
    else:
        sums.rounded(found, count, out + 2 * PAIR * pair, op.out_stride)
