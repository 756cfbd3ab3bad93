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
from numba.core.cgutils import alloca_once, for_range, get_or_insert_function
from numba.extending import intrinsic

from lpa_model.kernels import singles
from lpa_model.kernels.machine import address, compiled, prefetch_rows
from lpa_model.kernels.tiles import TOKENS
from lpa_model.kernels.vectors import FLOATS, INTEGERS, ask, dot_pairs, floats, load, spread, store

ROWS = 8  # whose sums stay in registers, two vectors each
UNROLLED = 4
PAIRS = 16  # in the 64 bytes of a row that a tile takes
COLUMNS = 32  # of a square
ROW = 4 * COLUMNS  # bytes


def _write_rows(function: Any, vectors: int, size: int) -> None:
    """The body of a function as `_rows` describes it."""
    builder = ir.IRBuilder(function.append_basic_block())
    x, stride, step, left, right, parts, count, fresh, out, out_stride, ahead = function.args
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
        with for_range(builder, parts) as part, for_range(builder, parts.type(PAIRS // UNROLLED)) as few:
            at = builder.add(builder.mul(part.index, step), builder.mul(few.index, step.type(4 * UNROLLED)))
            here = [builder.add(row, at) for row in rows[:some]]
            pair = builder.add(builder.mul(part.index, at.type(PAIRS)), builder.mul(few.index, at.type(UNROLLED)))
            columns = [builder.add(column, builder.mul(pair, at.type(size))) for column in (left, right)[:vectors]]
            for i in range(UNROLLED):
                for column in columns:
                    ask(builder, builder.add(column, builder.add(ahead, ahead.type(size * i))))
                met = [load(builder, column, size * i, INTEGERS) for column in columns]
                for row, totals in zip(here, sums, strict=False):
                    both = spread(builder, load(builder, row, 4 * i, ir.IntType(32)))
                    for column, total in zip(met, totals, strict=True):
                        builder.store(dot_pairs(builder, builder.load(total), both, column), total)
        for total, to, offset in places:
            store(builder, builder.load(total), to, offset)
        builder.branch(after)
    builder.position_at_end(after)
    builder.ret_void()


def _rows(vectors: int, size: int) -> Any:
    """A compiled function for one vector of columns, or two, whose next pairs lie `size` bytes further on.

    (x, stride, step, left, right, parts, count, fresh, out, out_stride, ahead), all addresses and numbers but `fresh`:
    out float32 [count, 16 * vectors] += x bfloat16 [count, 32 * parts] . columns, for 1 to ROWS rows; `fresh`: out is
    overwritten instead. Rows lie `stride` bytes apart, and 32 numbers of a row `step`. What lies `ahead` bytes behind
    the columns is asked for.
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
        ahead: Any,
    ) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
            function = get_or_insert_function(builder.module, kind, f"lpa_rows_{vectors}_{size}")
            if function.is_declaration:
                function.linkage = "linkonce_odr"
                function.attributes.add("noinline")  # it is long
                _write_rows(function, vectors, size)
            builder.call(function, arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, types.boolean, *[types.int64] * 3), build

    return rows


_of_strips = _rows(2, 64)
_of_columns = _rows(2, ROW)
_of_one_strip = _rows(1, 64)


@compiled
def multiply_strips(x, stride, weight, depth, count, ahead, found):
    """float32 [count, 32] at `found` from x [count, 32 * depth] and two strips of weights, as `programs.tiled` lays
    them out; the strips `ahead` bytes behind them are asked for."""
    left, right = weight, weight + 1024 * depth
    for r in range(0, count, ROWS):
        some = min(ROWS, count - r)
        _of_strips(x + r * stride, stride, 64, left, right, depth, some, True, found + r * ROW, ROW, ahead)


@compiled
def multiply_columns(rows, stride, step, strip, parts, fresh, columns, out):
    """As `tiles.multiply_columns`."""
    for r in range(0, COLUMNS, ROWS):
        source = rows + r // PAIRS * strip + r % PAIRS * stride
        _of_columns(source, stride, step, columns, columns + ROW // 2, parts, ROWS, fresh, out + r * ROW, ROW, 0)


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
            _of_one_strip(rows + t * stride, stride, 64, queries, queries, parts, ROWS, True, found + 64 * t, 64, 0)
        for h in range(out.shape[0]):
            for t in range(TOKENS):
                out[h, at + first + t] = some[t, h] * scale


@compiled
def mix(weights, at, values, tokens, pairs, out, ahead):
    """As `tiles.mix`, for all of the rows of `out` and no more; `pairs` takes [width / 32, TOKENS / 2, 32]."""
    heads, width = out.shape
    row, columns, size = out.ctypes.data, pairs.ctypes.data, TOKENS // 2 * ROW
    for first in range(0, tokens, TOKENS):
        for i in range(TOKENS // 2):
            t = first + 2 * i
            prefetch_rows(ahead, t, 2, values.strides[0])
            even = values.ctypes.data + t * values.strides[0]
            if t + 1 < tokens:
                singles.interleave(even, even + values.strides[0], width // COLUMNS, columns + i * ROW, size)
            else:  # what nobody has written need not be a number
                for j in range(width // COLUMNS):
                    both = carray(address(columns + j * size + i * ROW, np.uint32(0)), (COLUMNS,))
                    for c in range(COLUMNS):
                        both[c] = np.uint32(values[t, j * COLUMNS + c]) if t < tokens else np.uint32(0)
        left = weights.ctypes.data + 2 * (at + first)
        for j in range(0, width, COLUMNS):
            met = columns + j // COLUMNS * size
            for h in range(0, heads, ROWS):
                stride, to = weights.strides[0], row + 4 * (h * width + j)
                some = min(ROWS, heads - h)
                source = left + h * stride
                _of_columns(source, stride, 64, met, met + ROW // 2, TOKENS // 32, some, False, to, 4 * width, 0)
