"""Arithmetic on columns side by side, COLUMNS of them in two vectors: loops that the compiler does not find by itself.

All arguments are addresses, counts and factors. bfloat16 numbers are written two rows in one, as uint32: the even
row's in the lower half.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range
from numba.extending import intrinsic

from lpa_model.backends.cpu.numba.vectors import (
    HALVES,
    INTEGERS,
    LANES,
    exp2,
    floats,
    larger,
    load,
    pair,
    shuffled,
    spread,
    store,
    store_some,
    turned,
)

COLUMNS = 2 * LANES
ROW = 4 * COLUMNS  # bytes
HALF = ROW // 2


def _at(address: Any, builder: Any, i: Any, stride: Any) -> Any:
    return builder.add(address, builder.mul(i, stride))


@intrinsic
def maxima(typing: Any, rows: Any, pairs: Any, out: Any) -> Any:
    """out float32 [COLUMNS] from rows float32 [2 * pairs, COLUMNS]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, pairs, out = arguments
        peaks = [alloca_once_value(builder, floats(float("-inf"))) for _ in range(4)]  # none waits for the other
        with for_range(builder, pairs) as loop:
            row = _at(rows, builder, loop.index, pairs.type(2 * ROW))
            for i, peak in enumerate(peaks):
                builder.store(larger(builder, load(builder, row, i * HALF), builder.load(peak)), peak)
        left, right, other_left, other_right = (builder.load(peak) for peak in peaks)
        store(builder, larger(builder, left, other_left), out)
        store(builder, larger(builder, right, other_right), out, HALF)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic
def raise_peaks(typing: Any, found: Any, margin: Any, scale: Any, peaks: Any, sums: Any, factors: Any) -> Any:
    """Whether any of float32 [COLUMNS] at `found` is larger by more than `margin` than the one at `peaks`.

    It takes that one's place then, and what was summed beneath the old one has to be multiplied by `factors`, as
    `sums` [COLUMNS] are here: 2^(scale * (old - new)), exactly 1 where nothing has changed.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found, margin, scale, peaks, sums, factors = arguments
        margin, scale = spread(builder, margin), spread(builder, scale)
        higher = ir.Constant(ir.IntType(LANES), 0)
        for offset in (0, HALF):
            old, new = load(builder, peaks, offset), load(builder, found, offset)
            raised = builder.fcmp_ordered(">", new, builder.fadd(old, margin))
            higher = builder.or_(higher, builder.bitcast(raised, higher.type))
            factor = exp2(builder, builder.fmul(builder.fsub(old, new), scale))
            factor = builder.select(raised, factor, floats(1))
            store(builder, builder.select(raised, new, old), peaks, offset)
            store(builder, builder.fmul(load(builder, sums, offset), factor), sums, offset)
            store(builder, factor, factors, offset)
        return builder.icmp_unsigned("!=", higher, higher.type(0))

    return types.boolean(types.int64, types.float32, types.float32, types.int64, types.int64, types.int64), build


@intrinsic
def exponentials(typing: Any, rows: Any, pairs: Any, peaks: Any, scale: Any, out: Any, sums: Any) -> Any:
    """out uint32 [pairs, COLUMNS] from 2^(scale * (rows - peaks)), rows float32 [2 * pairs, COLUMNS], which are added
    to sums float32 [COLUMNS]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, pairs, peaks, scale, out, sums = arguments
        factor = spread(builder, scale)
        halves = [
            (offset, load(builder, peaks, offset), alloca_once_value(builder, load(builder, sums, offset)))
            for offset in (0, HALF)
        ]
        with for_range(builder, pairs) as loop:
            row = _at(rows, builder, loop.index, pairs.type(2 * ROW))
            to = _at(out, builder, loop.index, pairs.type(ROW))
            for offset, peak, total in halves:
                even, odd = (
                    exp2(builder, builder.fmul(builder.fsub(load(builder, row, offset + start), peak), factor))
                    for start in (0, ROW)
                )
                builder.store(builder.fadd(builder.load(total), builder.fadd(even, odd)), total)
                store(builder, pair(builder, even, odd), to, offset)
        for offset, _, total in halves:
            store(builder, builder.load(total), sums, offset)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.int64, types.int64), build


@intrinsic
def multiply(typing: Any, rows: Any, count: Any, factors: Any) -> Any:
    """Rows float32 [count, COLUMNS] times factors [COLUMNS], in place."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, count, factors = arguments
        halves = [(offset, load(builder, factors, offset)) for offset in (0, HALF)]
        with for_range(builder, count) as loop:
            row = _at(rows, builder, loop.index, count.type(ROW))
            for offset, factor in halves:
                store(builder, builder.fmul(load(builder, row, offset), factor), row, offset)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic
def shares(typing: Any, rows: Any, pairs: Any, sums: Any, out: Any) -> Any:
    """out uint32 [pairs, COLUMNS] from rows / sums, rows float32 [2 * pairs, COLUMNS]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, pairs, sums, out = arguments
        for offset in (0, HALF):
            share = builder.fdiv(floats(1), load(builder, sums, offset))
            with for_range(builder, pairs) as loop:
                row = _at(rows, builder, loop.index, pairs.type(2 * ROW))
                even, odd = (builder.fmul(load(builder, row, offset + start), share) for start in (0, ROW))
                store(builder, pair(builder, even, odd), _at(out, builder, loop.index, pairs.type(ROW)), offset)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), build


@intrinsic
def hide(typing: Any, rows: Any, first: Any, count: Any) -> Any:
    """In row i of float32 [count, COLUMNS], columns 0 to first + i become -inf."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, first, count = arguments
        with for_range(builder, count) as loop:
            row = _at(rows, builder, loop.index, count.type(ROW))
            i = spread(builder, builder.trunc(builder.add(first, loop.index), ir.IntType(32)))
            for offset, lane in ((0, 0), (HALF, LANES)):
                lanes = ir.Constant(INTEGERS, list(range(lane, lane + LANES)))
                hidden = builder.icmp_signed("<=", lanes, i)
                shown = builder.select(hidden, floats(float("-inf")), load(builder, row, offset))
                store(builder, shown, row, offset)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16: in each round, squares of half the size change places."""
    rows = list(rows)
    for size in (1, 2, 4, 8):
        first = [lane if not lane & size else LANES + lane - size for lane in range(LANES)]
        second = [lane + size if not lane & size else LANES + lane for lane in range(LANES)]
        for i in range(LANES):
            if not i & size:
                a, b = rows[i], rows[i + size]
                rows[i] = shuffled(builder, a, b, first)
                rows[i + size] = shuffled(builder, a, b, second)
    return rows


@intrinsic
def from_rows(typing: Any, rows: Any, stride: Any, count: Any, out: Any, out_stride: Any) -> Any:
    """Row i of uint32 [count, 16] becomes column i of `out` [16, 16]; the last row that there is stands for others."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, stride, count, out, out_stride = arguments
        last = builder.sub(count, count.type(1))
        found = []
        for i in range(LANES):
            there = builder.icmp_signed("<", count.type(i), last)
            row = builder.select(there, count.type(i), last)
            found.append(load(builder, _at(rows, builder, row, stride), 0, INTEGERS))
        for i, column in enumerate(_transposed(builder, found)):
            store(builder, column, _at(out, builder, count.type(i), out_stride))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), build


@intrinsic
def to_rows(typing: Any, columns: Any, stride: Any, count: Any, out: Any, out_stride: Any) -> Any:
    """Column i of uint32 [16, 16] becomes row i of `out` [count, 16]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        columns, stride, count, out, out_stride = arguments
        found = [load(builder, _at(columns, builder, count.type(i), stride), 0, INTEGERS) for i in range(LANES)]
        for i, row in enumerate(_transposed(builder, found)):
            with builder.if_then(builder.icmp_signed("<", count.type(i), count)):
                store(builder, row, _at(out, builder, count.type(i), out_stride))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), build


@intrinsic
def set_halves(typing: Any, x: Any, vectors: Any, upper: Any, pairs: Any) -> Any:
    """The lower halves of uint32 [16 * vectors] at `pairs`, or the upper ones, become bfloat16 [16 * vectors] at x. The
    others are not touched: another thread may be writing them."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, vectors, upper, pairs = arguments
        halves = ir.VectorType(ir.IntType(16), COLUMNS)
        shift = builder.trunc(builder.mul(upper, upper.type(LANES)), ir.IntType(32))
        lower = ir.Constant(ir.IntType(32), 0x55555555)
        mask = builder.shl(lower, builder.trunc(upper, lower.type))
        mask = builder.bitcast(mask, ir.VectorType(ir.IntType(1), COLUMNS))
        with for_range(builder, vectors) as loop:
            some = load(builder, _at(x, builder, loop.index, vectors.type(2 * LANES)), 0, HALVES)
            some = builder.bitcast(builder.shl(builder.zext(some, INTEGERS), spread(builder, shift)), halves)
            store_some(builder, some, _at(pairs, builder, loop.index, vectors.type(HALF)), mask)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


@intrinsic
def turn(typing: Any, x: Any, turns: Any, vectors: Any, out: Any) -> Any:
    """`decode.turn` of bfloat16 [16 * vectors] at x, with as many float32 at turns."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, turns, vectors, out = arguments
        with for_range(builder, vectors) as loop:
            at = builder.mul(loop.index, vectors.type(2 * LANES))
            by = load(builder, _at(turns, builder, loop.index, vectors.type(4 * LANES)))
            store(builder, turned(builder, builder.add(x, at), by), builder.add(out, at))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build
