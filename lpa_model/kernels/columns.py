"""Arithmetic on columns of 16 side by side, a vector at a time: loops that the compiler does not find by itself.

All arguments are addresses, counts and factors. bfloat16 results are rounded to nearest even and written two rows in
one, as uint32: the even row's in the lower half.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range, get_or_insert_function
from numba.extending import intrinsic

LANES = 16
FLOATS = ir.VectorType(ir.FloatType(), LANES)
INTEGERS = ir.VectorType(ir.IntType(32), LANES)
FAST = ("contract", "reassoc", "nsz")
# 2^y on [0, 1), a minimax polynomial, highest power first: as in `machine.exp`
SERIES = (1.8775767e-3, 8.9893397e-3, 5.5826318e-2, 2.4015361e-1, 6.9315308e-1, 0.99999994)


def _floats(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)


def _integers(value: int) -> Any:
    return ir.Constant(INTEGERS, [value] * LANES)


def _at(builder: Any, address: Any, row: Any, kind: Any) -> Any:
    """A pointer to the row of 64 bytes, which need not be aligned."""
    offset = builder.shl(row, ir.Constant(row.type, 6))
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _load(builder: Any, address: Any, row: Any) -> Any:
    return builder.load(_at(builder, address, row, FLOATS), align=4)


def _store(builder: Any, value: Any, address: Any, row: Any) -> None:
    builder.store(value, _at(builder, address, row, value.type), align=4)


def _spread(builder: Any, number: Any) -> Any:
    """A float32 in all lanes."""
    lane = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(lane, lane, _integers(0))


def _exp(builder: Any, x: Any) -> Any:
    """e^x for x <= 0; NaN stays NaN."""
    power = builder.fmul(x, _floats(1.4426950408889634))
    power = builder.select(builder.fcmp_ordered("<", power, _floats(-126)), _floats(-126), power)
    floor = get_or_insert_function(builder.module, ir.FunctionType(FLOATS, [FLOATS]), "llvm.floor.v16f32")
    whole = builder.call(floor, [power])
    y = builder.fsub(power, whole)
    series = _floats(SERIES[0])
    for factor in SERIES[1:]:
        series = builder.fadd(builder.fmul(series, y, FAST), _floats(factor), FAST)
    exponent = builder.add(builder.fptosi(whole, INTEGERS), _integers(127))
    return builder.fmul(series, builder.bitcast(builder.shl(exponent, _integers(23)), FLOATS))


def _pack(builder: Any, even: Any, odd: Any) -> Any:
    def rounded(x: Any) -> Any:
        bits = builder.bitcast(x, INTEGERS)
        last = builder.and_(builder.lshr(bits, _integers(16)), _integers(1))
        return builder.add(bits, builder.add(last, _integers(0x7FFF)))

    low = builder.lshr(rounded(even), _integers(16))
    return builder.or_(low, builder.and_(rounded(odd), _integers(0xFFFF0000)))


def _twice(builder: Any, i: Any) -> tuple[Any, Any]:
    even = builder.shl(i, ir.Constant(i.type, 1))
    return even, builder.add(even, ir.Constant(i.type, 1))


@intrinsic
def maxima(typing: Any, rows: Any, count: Any, out: Any) -> Any:
    """out float32 [16] from rows float32 [count, 16]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, count, out = arguments
        peak = alloca_once_value(builder, _floats(float("-inf")))
        with for_range(builder, count) as loop:
            best, row = builder.load(peak), _load(builder, rows, loop.index)
            builder.store(builder.select(builder.fcmp_ordered(">", row, best), row, best), peak)
        _store(builder, builder.load(peak), out, ir.Constant(count.type, 0))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic
def exponentials(typing: Any, rows: Any, pairs: Any, peaks: Any, scale: Any, out: Any, sums: Any) -> Any:
    """out uint32 [pairs, 16] from e^(scale * (rows - peaks)), rows float32 [2 * pairs, 16]; sums float32 [16]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, pairs, peaks, scale, out, sums = arguments
        zero = ir.Constant(pairs.type, 0)
        peak, factor = _load(builder, peaks, zero), _spread(builder, scale)
        total = alloca_once_value(builder, _floats(0.0))
        with for_range(builder, pairs) as loop:
            even, odd = (
                _exp(builder, builder.fmul(builder.fsub(_load(builder, rows, i), peak), factor))
                for i in _twice(builder, loop.index)
            )
            builder.store(builder.fadd(builder.load(total), builder.fadd(even, odd)), total)
            _store(builder, _pack(builder, even, odd), out, loop.index)
        _store(builder, builder.load(total), sums, zero)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.int64, types.int64), build


@intrinsic
def shares(typing: Any, rows: Any, pairs: Any, sums: Any, out: Any) -> Any:
    """out uint32 [pairs, 16] from rows / sums, rows float32 [2 * pairs, 16]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, pairs, sums, out = arguments
        share = builder.fdiv(_floats(1.0), _load(builder, sums, ir.Constant(pairs.type, 0)))
        with for_range(builder, pairs) as loop:
            even, odd = (builder.fmul(_load(builder, rows, i), share) for i in _twice(builder, loop.index))
            _store(builder, _pack(builder, even, odd), out, loop.index)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), build
