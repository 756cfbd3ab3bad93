"""Arithmetic on columns of 16 side by side, a vector at a time: loops that the compiler does not find by itself.

All arguments are addresses, counts and factors. bfloat16 results are rounded to nearest even and written two rows in
one, as uint32: the even row's in the lower half.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core.cgutils import alloca_once_value, for_range
from numba.extending import intrinsic

from lpa_model.kernels.vectors import exp2, floats, load, pair, spread, store

ROW = 64  # bytes


def _row(builder: Any, address: Any, i: Any) -> Any:
    return builder.add(address, builder.mul(i, i.type(ROW)))


def _twice(builder: Any, rows: Any, i: Any) -> tuple[Any, Any]:
    """Rows 2i and 2i + 1."""
    row = _row(builder, rows, builder.mul(i, i.type(2)))
    return load(builder, row), load(builder, row, ROW)


@intrinsic
def maxima(typing: Any, rows: Any, fours: Any, out: Any) -> Any:
    """out float32 [16] from rows float32 [4 * fours, 16]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def larger(x: Any, y: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", x, y), x, y)

        rows, fours, out = arguments
        peaks = [alloca_once_value(builder, floats(float("-inf"))) for _ in range(4)]  # none waits for the other
        with for_range(builder, fours) as loop:
            row = _row(builder, rows, builder.mul(loop.index, fours.type(4)))
            for i, peak in enumerate(peaks):
                builder.store(larger(load(builder, row, i * ROW), builder.load(peak)), peak)
        a, b, c, d = (builder.load(peak) for peak in peaks)
        store(builder, larger(larger(a, b), larger(c, d)), out)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic
def exponentials(typing: Any, rows: Any, pairs: Any, peaks: Any, scale: Any, out: Any, sums: Any) -> Any:
    """out uint32 [pairs, 16] from 2^(scale * (rows - peaks)), rows float32 [2 * pairs, 16]; sums float32 [16]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, pairs, peaks, scale, out, sums = arguments
        peak, factor = load(builder, peaks), spread(builder, scale)
        total = alloca_once_value(builder, floats(0))
        with for_range(builder, pairs) as loop:
            even, odd = (
                exp2(builder, builder.fmul(builder.fsub(row, peak), factor))
                for row in _twice(builder, rows, loop.index)
            )
            builder.store(builder.fadd(builder.load(total), builder.fadd(even, odd)), total)
            store(builder, pair(builder, even, odd), _row(builder, out, loop.index))
        store(builder, builder.load(total), sums)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.int64, types.int64), build


@intrinsic
def shares(typing: Any, rows: Any, pairs: Any, sums: Any, out: Any) -> Any:
    """out uint32 [pairs, 16] from rows / sums, rows float32 [2 * pairs, 16]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, pairs, sums, out = arguments
        share = builder.fdiv(floats(1), load(builder, sums))
        with for_range(builder, pairs) as loop:
            even, odd = (builder.fmul(row, share) for row in _twice(builder, rows, loop.index))
            store(builder, pair(builder, even, odd), _row(builder, out, loop.index))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), build
