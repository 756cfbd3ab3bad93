"""Products of bfloat16 in vectors (AVX-512 with bfloat16): what `tiles` does, for processors that have none.

`dpbf16ps` adds to 16 float32 the products of as many pairs of bfloat16: here of a pair that is the same for all, two
neighbours in a row, and of one in each column. Operands lie as tiles take them: columns' pairs are uint32 side by side.
A number of a result is summed in the order of its pairs, whatever the number of rows and columns.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once, for_range, get_or_insert_function
from numba.extending import intrinsic

from lpa_model.backends.cpu.numba.machine import ask, compiled
from lpa_model.backends.cpu.numba.vectors import FLOATS, INTEGERS, dot_pairs, floats, load, spread, store

ROWS = 8  # whose sums stay in registers, two vectors each
UNROLLED = 4  # pairs in a round of the loop
PAIRS = 16  # in the 64 bytes of a row that a tile takes
COLUMNS = 32  # of a square
ROW = 4 * COLUMNS  # bytes
STRIP_ROW = ROW // 2


def _columns(builder: Any, left: Any, right: Any, pair: Any, size: int | None) -> tuple[list[Any], list[Any]]:
    """Where a pair of 32 columns lies, and the columns in two vectors; see `_rows`."""
    if size is None:
        place = builder.add(left, builder.mul(right, pair))
        return [place, builder.add(place, place.type(64))], [load(builder, place, 64 * i, INTEGERS) for i in range(2)]
    places = [builder.add(start, builder.mul(pair, pair.type(size))) for start in (left, right)]
    return places, [load(builder, place, 0, INTEGERS) for place in places]


def _write_rows(function: Any, size: int | None) -> None:
    """The body of a function as `_rows` describes it."""
    builder = ir.IRBuilder(function.append_basic_block())
    x, stride, step, left, right, parts, count, fresh, out, out_stride, ahead = function.args
    rows = [builder.add(x, builder.mul(stride, stride.type(r))) for r in range(ROWS)]
    outs = [builder.add(out, builder.mul(out_stride, stride.type(r))) for r in range(ROWS)]
    sums = [[alloca_once(builder, FLOATS) for _ in range(2)] for _ in range(ROWS)]
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
            for i in range(UNROLLED):
                lines, met = _columns(builder, left, right, builder.add(pair, at.type(i)), size)
                for place in lines if size == STRIP_ROW else ():
                    ask(builder, builder.add(place, ahead))
                for row, totals in zip(here, sums, strict=False):
                    both = spread(builder, load(builder, row, 4 * i, ir.IntType(32)))
                    for column, total in zip(met, totals, strict=True):
                        builder.store(dot_pairs(builder, builder.load(total), both, column), total)
        for total, to, offset in places:
            store(builder, builder.load(total), to, offset)
        builder.branch(after)
    builder.position_at_end(after)
    builder.ret_void()


def _rows(size: int | None) -> Any:
    """A compiled function for columns in two vectors of pairs, at `left` and `right`, whose next ones lie `size` bytes
    further on; or, without a size, both vectors at `left`, and the next ones `right` bytes further on.

    (x, stride, step, left, right, parts, count, fresh, out, out_stride, ahead), all addresses and numbers but `fresh`:
    out float32 [count, 32] += x bfloat16 [count, 32 * parts] . columns, for 1 to ROWS rows; `fresh`: out is
    overwritten instead. Rows lie `stride` bytes apart, and 32 numbers of a row `step`. What lies `ahead` bytes behind
    the columns of strips is prefetched.
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
            function = get_or_insert_function(builder.module, kind, f"lpa_rows_{size}")
            if function.is_declaration:
                function.linkage = "linkonce_odr"
                function.attributes.add("noinline")  # it is long
                _write_rows(function, size)
            builder.call(function, arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, types.boolean, *[types.int64] * 3), build

    return rows


_of_strips = _rows(STRIP_ROW)
_of_columns = _rows(ROW)
_of_values = _rows(None)


@compiled
def multiply_strips(x, stride, weight, depth, count, ahead, found):
    """float32 [count, 32] at `found` from x [count, 32 * depth] and two strips of weights, as `programs.tiled` lays
    them out; the strips `ahead` bytes behind them are prefetched."""
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
def mix(weights, step, values, width, count, fresh, out):
    """out float32 [count, width] += weights bfloat16 [count, 32], rows `step` bytes apart, . values [16, width, 2], two
    tokens' side by side; `fresh`: out is overwritten instead."""
    line = 4 * width
    for j in range(0, width, COLUMNS):
        for h in range(0, count, ROWS):
            to, some = out + h * line + 4 * j, min(ROWS, count - h)
            _of_values(weights + h * step, step, 0, values + 4 * j, line, 1, some, fresh, to, line, 0)
