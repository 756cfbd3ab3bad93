"""Products of bfloat16 in vectors (AVX-512 with bfloat16): what `tiles` does, for processors that have none.

`dpbf16ps` adds to 16 float32 the products of as many pairs of bfloat16: here of a pair that is the same for all, two
neighbours in a row, and of one in each column. Operands lie as tiles take them: columns' pairs are uint32 side by side.
A number of a result is summed in the order of its pairs, whatever the number of rows and columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core.cgutils import alloca_once, for_range
from numba.extending import intrinsic

from lpa_model.kernels.machine import address, compiled, prefetch_rows
from lpa_model.kernels.tiles import TOKENS
from lpa_model.kernels.vectors import FLOATS, INTEGERS, dot_pairs, floats, load, spread, store

ROWS = 8  # whose sums stay in registers, two vectors each
PAIRS = 16  # in the 64 bytes of a row that a tile takes
COLUMNS = 32  # of a square
ROW = 4 * COLUMNS  # bytes


def _rows(vectors: int, size: int) -> Any:
    """A compiled function for one vector of columns, or two, whose next pairs lie `size` bytes further on.

    (x, stride, step, left, right, parts, count, fresh, out, out_stride), all addresses and numbers but the last but
    two: out float32 [count, 16 * vectors] += x bfloat16 [count, 32 * parts] . columns, for 1 to ROWS rows; `fresh`: out
    is overwritten instead. Rows lie `stride` bytes apart, and 32 numbers of a row `step`.
    """

    @intrinsic
    def rows(
        typing: Any,
        x: Any,
        stride: Any,
        step: Any,
        left: Any,
        right: Any,
        parts: Any,
        count: Any,
        fresh: Any,
        out: Any,
        out_stride: Any,
    ) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, stride, step, left, right, parts, count, fresh, out, out_stride = arguments
            rows = [builder.add(x, builder.mul(stride, stride.type(r))) for r in range(ROWS)]
            outs = [builder.add(out, builder.mul(out_stride, stride.type(r))) for r in range(ROWS)]
            sums = [[alloca_once(builder, FLOATS) for _ in range(vectors)] for _ in range(ROWS)]
            after = builder.append_basic_block()
            switch = builder.switch(count, after)
            for some in range(1, ROWS + 1):
                case = builder.append_basic_block()
                switch.add_case(count.type(some), case)
                builder.position_at_end(case)
                places = [(total, outs[r], 64 * v) for r in range(some) for v, total in enumerate(sums[r])]
                for total, to, offset in places:
                    builder.store(builder.select(fresh, floats(0), load(builder, to, offset)), total)
                with for_range(builder, parts) as loop:
                    at = builder.mul(loop.index, step)
                    here = [builder.add(row, at) for row in rows[:some]]
                    skipped = builder.mul(loop.index, step.type(PAIRS * size))
                    columns = [builder.add(column, skipped) for column in (left, right)[:vectors]]
                    for i in range(PAIRS):
                        met = [load(builder, column, size * i, INTEGERS) for column in columns]
                        for row, totals in zip(here, sums, strict=False):
                            pair = spread(builder, load(builder, row, 4 * i, ir.IntType(32)))
                            for column, total in zip(met, totals, strict=True):
                                builder.store(dot_pairs(builder, builder.load(total), pair, column), total)
                for total, to, offset in places:
                    store(builder, builder.load(total), to, offset)
                builder.branch(after)
            builder.position_at_end(after)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, types.boolean, types.int64, types.int64), build

    return rows


_of_strips = _rows(2, 64)
_of_columns = _rows(2, ROW)
_of_one_strip = _rows(1, 64)


@compiled
def multiply_strips(x, stride, left, right, depth, count, found):
    """float32 [count, 32] at `found` from x [count, 32 * depth] and two strips of weights, as `programs.tiled` lays
    them out."""
    for r in range(0, count, ROWS):
        some = min(ROWS, count - r)
        _of_strips(x + r * stride, stride, 64, left, right, depth, some, True, found + r * ROW, ROW)


@compiled
def multiply_columns(rows, stride, step, strip, parts, fresh, columns, out):
    """As `tiles.multiply_columns`."""
    for r in range(0, COLUMNS, ROWS):
        source = rows + r // PAIRS * strip + r % PAIRS * stride
        _of_columns(source, stride, step, columns, columns + ROW // 2, parts, ROWS, fresh, out + r * ROW, ROW)


@compiled
def scores(keys, pairs, scale, out, at, some, ahead):
    """As `tiles.scores`."""
    stride, queries, found = keys.strides[0], pairs.ctypes.data, some.ctypes.data
    for first in range(0, keys.shape[0], TOKENS):
        rows = keys.ctypes.data + first * stride
        for t in range(0, TOKENS, ROWS):
            if ahead:
                prefetch_rows(ahead, first + t, ROWS, stride)
            parts = keys.shape[1] // COLUMNS
            _of_one_strip(rows + t * stride, stride, 64, queries, queries, parts, ROWS, True, found + 64 * t, 64)
        for h in range(out.shape[0]):
            for t in range(TOKENS):
                out[h, at + first + t] = some[t, h] * scale


@compiled
def mix(weights, at, values, tokens, pairs, out, ahead):
    """As `tiles.mix`, for all of the rows of `out` and no more; `pairs` takes [width / 32, TOKENS / 2, 32]."""
    heads, width = out.shape
    row, columns, empty = out.ctypes.data, pairs.ctypes.data, np.uint32(0)
    for first in range(0, tokens, TOKENS):
        for i in range(TOKENS // 2):
            t = first + 2 * i
            prefetch_rows(ahead, t, 2, values.strides[0])
            for j in range(0, width, COLUMNS):
                both = carray(address(columns + (j // COLUMNS * TOKENS // 2 + i) * ROW, empty), (COLUMNS,))
                if t + 1 < tokens:
                    for c in range(COLUMNS):
                        both[c] = np.uint32(values[t, j + c]) | (np.uint32(values[t + 1, j + c]) << np.uint32(16))
                elif t < tokens:
                    for c in range(COLUMNS):
                        both[c] = values[t, j + c]
                else:  # what nobody has written need not be a number
                    both[:] = 0
        left = weights.ctypes.data + 2 * (at + first)
        for j in range(0, width, COLUMNS):
            met = columns + j // COLUMNS * TOKENS // 2 * ROW
            for h in range(0, heads, ROWS):
                stride, to = weights.strides[0], row + 4 * (h * width + j)
                some = min(ROWS, heads - h)
                source = left + h * stride
                _of_columns(source, stride, 64, met, met + ROW // 2, TOKENS // 32, some, False, to, 4 * width)
