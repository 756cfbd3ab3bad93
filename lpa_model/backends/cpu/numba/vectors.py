"""Vectors of 16 float32 in LLVM's terms, for loops that the compiler does not find by itself.

They are built of instructions of AVX-512 with bfloat16, one where plain arithmetic would take five or ten. Addresses
are int64, offsets bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core.cgutils import get_or_insert_function

from lpa_model.backends.cpu.numba.machine import LOG2_E, SERIES

LANES = 16


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """LLVM's bfloat16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


FLOATS = ir.VectorType(ir.FloatType(), LANES)
INTEGERS = ir.VectorType(ir.IntType(32), LANES)
HALVES = ir.VectorType(ir.IntType(16), LANES)
ALL, AS_SET = ir.IntType(16)(-1), ir.IntType(32)(4)  # lanes, and the rounding mode of the moment
DOWN = ir.IntType(32)(9)  # to whole numbers, towards -infinity, without a signal


def floats(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)


def integers(value: int) -> Any:
    return ir.Constant(INTEGERS, [value] * LANES)


def _pointer(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    return builder.inttoptr(builder.add(address, address.type(offset)), kind.as_pointer())


def load(builder: Any, address: Any, offset: int = 0, kind: Any = FLOATS) -> Any:
    """64 bytes, or a vector of another kind; they need not be aligned."""
    return builder.load(_pointer(builder, address, offset, kind), align=2)


def store(builder: Any, value: Any, address: Any, offset: int = 0) -> None:
    builder.store(value, _pointer(builder, address, offset, value.type), align=2)


def store_some(builder: Any, value: Any, address: Any, mask: Any) -> None:
    """The lanes of the mask, a vector of bits."""
    pointer = _pointer(builder, address, 0, value.type)
    kind = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, ir.IntType(32), mask.type])
    name = f"llvm.masked.store.v{value.type.count}i{value.type.element.width}.p0"
    builder.call(get_or_insert_function(builder.module, kind, name), [value, pointer, ir.IntType(32)(2), mask])


def spread(builder: Any, number: Any) -> Any:
    """A number in all lanes."""
    empty = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    lane = builder.insert_element(empty, number, ir.IntType(32)(0))
    return builder.shuffle_vector(lane, lane, integers(0))


def shuffled(builder: Any, x: Any, y: Any, lanes: Sequence[int]) -> Any:
    """Lanes of x, and from LANES on of y."""
    return builder.shuffle_vector(x, y, ir.Constant(INTEGERS, list(lanes)))


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(get_or_insert_function(builder.module, kind, f"llvm.{name}"), arguments)


def exp2(builder: Any, power: Any) -> Any:
    """2^power to 2 units in the last place; NaN stays NaN."""
    y = _call(builder, "x86.avx512.mask.reduce.ps.512", FLOATS, power, DOWN, power, ALL, AS_SET)  # power - floor(power)
    series = floats(SERIES[0])
    for factor in SERIES[1:]:
        series = _call(builder, "fma.v16f32", FLOATS, series, y, floats(factor))
    return _call(builder, "x86.avx512.mask.scalef.ps.512", FLOATS, series, power, series, ALL, AS_SET)


def silu(builder: Any, x: Any) -> Any:
    """x / (1 + e^-x)."""
    power = builder.fmul(x, floats(-LOG2_E))
    power = builder.select(builder.fcmp_ordered(">", power, floats(126)), floats(126), power)  # infinity has no inverse
    below = builder.fadd(exp2(builder, power), floats(1))
    # an estimate to 14 bits, and a step of Newton's
    inverse = _call(builder, "x86.avx512.rcp14.ps.512", FLOATS, below, below, ALL)
    rest = _call(builder, "fma.v16f32", FLOATS, builder.fneg(below), inverse, floats(2))
    return builder.fmul(x, builder.fmul(inverse, rest))


def narrow(builder: Any, x: Any) -> Any:
    """bfloat16, rounded to nearest even."""
    found = _call(builder, "x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(_BFloat(), LANES), x)
    return builder.bitcast(found, HALVES)


def widen(builder: Any, x: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(x, INTEGERS), integers(16)), FLOATS)


def turned(builder: Any, address: Any, turns: Any) -> Any:
    """Neighbours of 16 bfloat16 at `address` turn by (cos, sin, cos, sin, ...), and are rounded again."""
    x = widen(builder, load(builder, address, 0, HALVES))
    neighbours = shuffled(builder, x, x, [lane ^ 1 for lane in range(LANES)])
    cos = shuffled(builder, turns, turns, [lane & ~1 for lane in range(LANES)])
    sin = shuffled(builder, turns, turns, [lane | 1 for lane in range(LANES)])
    sin = builder.fmul(sin, ir.Constant(FLOATS, [-1.0, 1.0] * (LANES // 2)))
    return narrow(builder, _call(builder, "fma.v16f32", FLOATS, x, cos, builder.fmul(neighbours, sin)))


def larger(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def dot_pairs(builder: Any, total: Any, x: Any, y: Any) -> Any:
    """total + the products of 32 bfloat16 in x and y, two in each lane; they come as vectors of 64 bytes."""
    kind = ir.VectorType(_BFloat(), 2 * LANES)
    x, y = builder.bitcast(x, kind), builder.bitcast(y, kind)
    return _call(builder, "x86.avx512bf16.dpbf16ps.512", FLOATS, total, x, y)


def sums_of(builder: Any, rows: Sequence[Any]) -> Any:
    """The sum over lanes of each of 16 vectors, in a lane each: halves are added until every part is one lane."""
    rows, size = list(rows), LANES
    while size > 1:
        starts = [part + lane for part in range(0, 2 * LANES, size) for lane in range(size // 2)]
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [
            builder.fadd(shuffled(builder, x, y, starts), shuffled(builder, x, y, [i + size // 2 for i in starts]))
            for x, y in pairs
        ]
        size //= 2
    return rows[0]


def pair(builder: Any, even: Any, odd: Any) -> Any:
    """Both as bfloat16 side by side, as uint32: `even` in the lower half."""
    low, high = (builder.zext(narrow(builder, x), INTEGERS) for x in (even, odd))
    return builder.or_(low, builder.shl(high, integers(16)))
