"""Arithmetic of single queries on 16 keys, scores or numbers of a value at a time, in loops that the compiler does not
find by itself.

All arguments are addresses, counts and factors.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range
from numba.extending import intrinsic

from lpa_model.backends.cpu.numba.machine import LOG2_E, ask
from lpa_model.backends.cpu.numba.vectors import (
    INTEGERS,
    LANES,
    dot_pairs,
    exp2,
    floats,
    integers,
    larger,
    load,
    narrow,
    shuffled,
    spread,
    store,
    sums_of,
)

SIDE = 4
PAIR = ir.IntType(32)


@intrinsic
def score(typing: Any, query: Any, keys: Any, stride: Any, parts: Any, out: Any) -> Any:
    """out float32 [16]: a query bfloat16 [32 * parts] . each of 16 keys, `stride` bytes apart."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, keys, stride, parts, out = arguments
        totals = [alloca_once_value(builder, floats(0)) for _ in range(LANES)]
        with for_range(builder, parts) as loop:
            at = builder.mul(loop.index, parts.type(4 * LANES))
            own = load(builder, builder.add(query, at))
            row = builder.add(keys, at)
            for total in totals:
                builder.store(dot_pairs(builder, builder.load(total), own, load(builder, row)), total)
                row = builder.add(row, stride)
        store(builder, sums_of(builder, [builder.load(total) for total in totals]), out)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), build


@intrinsic
def score_square(
    typing: Any, queries: Any, keys: Any, stride: Any, parts: Any, out: Any, out_stride: Any, ahead: Any
) -> Any:
    """out float32 [SIDE, SIDE], rows `out_stride` bytes apart: SIDE queries bfloat16 [32 * parts] . as many keys; both
    lie `stride` bytes apart. Two such rows at `ahead` are prefetched."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        queries, keys, stride, parts, out, out_stride, ahead = arguments
        sides = [stride.type(i) for i in range(SIDE)]
        totals = [alloca_once_value(builder, floats(0)) for _ in range(SIDE * SIDE)]
        with for_range(builder, parts) as loop:
            at = builder.mul(loop.index, parts.type(4 * LANES))
            ask(builder, builder.add(ahead, at))
            ask(builder, builder.add(ahead, builder.add(at, stride)))
            rows = [[builder.add(start, builder.mul(stride, i)) for i in sides] for start in (queries, keys)]
            left, right = ([load(builder, builder.add(row, at)) for row in some] for some in rows)
            for i, total in enumerate(totals):
                found = dot_pairs(builder, builder.load(total), left[i // SIDE], right[i % SIDE])
                builder.store(found, total)
        sums = sums_of(builder, [builder.load(total) for total in totals])
        for i in sides:
            lanes = [SIDE * i.constant + lane for lane in range(SIDE)]
            some = builder.shuffle_vector(sums, sums, ir.Constant(ir.VectorType(ir.IntType(32), SIDE), lanes))
            store(builder, some, builder.add(out, builder.mul(out_stride, i)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), build


@intrinsic
def mix(typing: Any, weights: Any, values: Any, pieces: Any, fresh: Any, out: Any) -> Any:
    """out float32 [32 * pieces] += weights bfloat16 [32] . values [16, 32 * pieces, 2], two tokens' side by side;
    `fresh`: out is overwritten instead."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, values, pieces, fresh, out = arguments
        line = builder.mul(pieces, pieces.type(8 * LANES))
        totals = [[alloca_once_value(builder, floats(0)) for _ in range(2)] for _ in range(SIDE)]
        with for_range(builder, pieces) as piece:
            at = builder.mul(piece.index, pieces.type(8 * LANES))
            to, start = builder.add(out, at), builder.add(values, at)
            for total in (total for some in totals for total in some):
                builder.store(floats(0), total)
            with for_range(builder, pieces.type(LANES // SIDE)) as few:
                for i, some in enumerate(totals):  # none waits for the other
                    pair = builder.add(builder.mul(few.index, pieces.type(SIDE)), pieces.type(i))
                    both = spread(
                        builder, load(builder, builder.add(weights, builder.mul(pair, pair.type(4))), 0, PAIR)
                    )
                    row = builder.add(start, builder.mul(pair, line))
                    for half, total in enumerate(some):
                        there = load(builder, row, 4 * LANES * half, INTEGERS)
                        builder.store(dot_pairs(builder, builder.load(total), both, there), total)
            for half in range(2):
                first, *others = (builder.load(some[half]) for some in totals)
                for other in others:
                    first = builder.fadd(first, other)
                before = builder.select(fresh, floats(0), load(builder, to, 4 * LANES * half))
                store(builder, builder.fadd(before, first), to, 4 * LANES * half)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.boolean, types.int64), build


def _over_lanes(builder: Any, x: Any, join: Any) -> Any:
    """All lanes joined, in every lane."""
    for distance in (8, 4, 2, 1):
        x = join(builder, x, shuffled(builder, x, x, [lane ^ distance for lane in range(LANES)]))
    return x


@intrinsic
def soften(typing: Any, scores: Any, count: Any, scale: Any, weights: Any, peak: Any, total: Any) -> Any:
    """weights bfloat16 [count] = e^(scale * (scores - their maximum)), scores being float32, and zeros from there to a
    multiple of 16. `scale` times the maximum, and the sum before it is rounded, go to `peak` and `total`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, count, scale, weights, peak, total = arguments
        vectors = builder.sdiv(builder.add(count, count.type(LANES - 1)), count.type(LANES))
        lanes = ir.Constant(integers(0).type, list(range(LANES)))
        last = builder.trunc(count, ir.IntType(32))

        def row(i: Any) -> Any:
            at = builder.add(scores, builder.mul(i, count.type(4 * LANES)))
            first = builder.trunc(builder.mul(i, count.type(LANES)), ir.IntType(32))
            there = builder.icmp_signed("<", builder.add(spread(builder, first), lanes), spread(builder, last))
            return builder.select(there, load(builder, at), floats(float("-inf")))

        highest = alloca_once_value(builder, floats(float("-inf")))
        with for_range(builder, vectors) as loop:
            builder.store(larger(builder, row(loop.index), builder.load(highest)), highest)
        most = _over_lanes(builder, builder.load(highest), larger)
        sums, power = alloca_once_value(builder, floats(0)), spread(builder, builder.fmul(scale, scale.type(LOG2_E)))
        with for_range(builder, vectors) as loop:
            found = exp2(builder, builder.fmul(builder.fsub(row(loop.index), most), power))
            builder.store(builder.fadd(builder.load(sums), found), sums)
            store(builder, narrow(builder, found), builder.add(weights, builder.mul(loop.index, count.type(2 * LANES))))
        most = builder.fmul(most, spread(builder, scale))
        for value, to in ((most, peak), (_over_lanes(builder, builder.load(sums), ir.IRBuilder.fadd), total)):
            first = builder.extract_element(value, ir.IntType(32)(0))
            builder.store(first, builder.inttoptr(to, first.type.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, *[types.int64] * 3), build
