"""Arithmetic of single queries on 16 keys or scores at a time: loops that the compiler does less well by itself.

All arguments are addresses, counts and factors.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range
from numba.extending import intrinsic

from lpa_model.kernels.machine import LOG2_E, ask
from lpa_model.kernels.vectors import (
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


@intrinsic
def score(typing: Any, query: Any, keys: Any, stride: Any, parts: Any, scale: Any, out: Any) -> Any:
    """out float32 [16]: `scale` times a query bfloat16 [32 * parts] . each of 16 keys, `stride` bytes apart."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, keys, stride, parts, scale, out = arguments
        totals = [alloca_once_value(builder, floats(0)) for _ in range(LANES)]
        with for_range(builder, parts) as loop:
            at = builder.mul(loop.index, parts.type(4 * LANES))
            own = load(builder, builder.add(query, at))
            row = builder.add(keys, at)
            for total in totals:
                builder.store(dot_pairs(builder, builder.load(total), own, load(builder, row)), total)
                row = builder.add(row, stride)
        found = sums_of(builder, [builder.load(total) for total in totals])
        store(builder, builder.fmul(found, spread(builder, scale)), out)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.float32, types.int64), build


@intrinsic
def score_square(
    typing: Any, queries: Any, keys: Any, stride: Any, parts: Any, scale: Any, out: Any, out_stride: Any, ahead: Any
) -> Any:
    """out float32 [SIDE, SIDE], rows `out_stride` bytes apart: `scale` times SIDE queries bfloat16 [32 * parts] . as
    many keys; both lie `stride` bytes apart. Two such rows at `ahead` are asked for."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        queries, keys, stride, parts, scale, out, out_stride, ahead = arguments
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
        sums = builder.fmul(sums_of(builder, [builder.load(total) for total in totals]), spread(builder, scale))
        for i in sides:
            lanes = [SIDE * i.constant + lane for lane in range(SIDE)]
            some = builder.shuffle_vector(sums, sums, ir.Constant(ir.VectorType(ir.IntType(32), SIDE), lanes))
            store(builder, some, builder.add(out, builder.mul(out_stride, i)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.float32, *[types.int64] * 3), build


def _over_lanes(builder: Any, x: Any, join: Any) -> Any:
    """All lanes joined, in every lane."""
    for distance in (8, 4, 2, 1):
        x = join(builder, x, shuffled(builder, x, x, [lane ^ distance for lane in range(LANES)]))
    return x


@intrinsic
def soften(typing: Any, scores: Any, count: Any, weights: Any, peak: Any, total: Any) -> Any:
    """scores float32 [count] become e^(score - their maximum), and zeros from there to a multiple of 16; `weights`
    bfloat16 are the same, rounded. The maximum and the sum, float32, go to `peak` and `total`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, count, weights, peak, total = arguments
        vectors = builder.sdiv(builder.add(count, count.type(LANES - 1)), count.type(LANES))
        lanes = ir.Constant(integers(0).type, list(range(LANES)))
        last = builder.trunc(count, ir.IntType(32))

        def row(i: Any) -> tuple[Any, Any]:
            at = builder.add(scores, builder.mul(i, count.type(4 * LANES)))
            first = builder.trunc(builder.mul(i, count.type(LANES)), ir.IntType(32))
            there = builder.icmp_signed("<", builder.add(spread(builder, first), lanes), spread(builder, last))
            return at, builder.select(there, load(builder, at), floats(float("-inf")))

        highest = alloca_once_value(builder, floats(float("-inf")))
        with for_range(builder, vectors) as loop:
            builder.store(larger(builder, row(loop.index)[1], builder.load(highest)), highest)
        most = _over_lanes(builder, builder.load(highest), larger)
        sums = alloca_once_value(builder, floats(0))
        with for_range(builder, vectors) as loop:
            at, some = row(loop.index)
            found = exp2(builder, builder.fmul(builder.fsub(some, most), floats(LOG2_E)))
            builder.store(builder.fadd(builder.load(sums), found), sums)
            store(builder, found, at)
            store(builder, narrow(builder, found), builder.add(weights, builder.mul(loop.index, count.type(2 * LANES))))
        for value, to in ((most, peak), (_over_lanes(builder, builder.load(sums), ir.IRBuilder.fadd), total)):
            first = builder.extract_element(value, ir.IntType(32)(0))
            builder.store(first, builder.inttoptr(to, first.type.as_pointer()))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), build
