"""What the kernels are written in: numba's decorator, and the machine's operations that Python has no word for.

bfloat16 numbers travel as uint16. Arguments named `like` are there for their type only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, from_dtype, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

# sums may be taken in any order, so that they are vectors; nothing is assumed about infinities and NaN
compiled = njit(fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy")
# a part of its caller, without floating point: LLVM goes through what is called once for each function above it
part = njit(inline="always")
ZERO = np.float32(0)
LINE = 64  # bytes
LOG2_E = 1.4426950408889634
# 2^y on [0, 1), a minimax polynomial, highest power first
SERIES = (1.8775767e-3, 8.9893397e-3, 5.5826318e-2, 2.4015361e-1, 6.9315308e-1, 0.99999994)


@intrinsic
def address(typing: Any, address: Any, like: Any) -> Any:
    """A pointer to numbers of the type of `like`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), build


def pointer_to(record: Any) -> Any:
    """A compiled function from an address to a pointer to a record."""
    kind = types.CPointer(from_dtype(record))

    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(kind))

        return kind(address), build

    return pointer


@intrinsic
def fetch_add(typing: Any, address: Any) -> Any:
    """Add 1 to the int64 at `address` for all threads to see; returns what was there."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(address), build


@intrinsic
def fetch(typing: Any, address: Any) -> Any:
    """The int64 at `address`, as other threads last wrote it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(address), build


@intrinsic
def pause(typing: Any) -> Any:
    """Some dozen nanoseconds of an x86 processor, which it leaves to whoever shares it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def widen(typing: Any, x: Any) -> Any:
    """A cached number as float32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if x == types.float32:
            return arguments[0]
        bits = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, 16)), ir.FloatType())

    return types.float32(x), build


@intrinsic
def narrow(typing: Any, x: Any, like: Any) -> Any:
    """A float32 as a cached number, rounded to nearest even."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like == types.float32:
            return arguments[0]
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        sixteen, one = ir.Constant(bits.type, 16), ir.Constant(bits.type, 1)
        odd = builder.and_(builder.lshr(bits, sixteen), one)
        bits = builder.add(bits, builder.add(odd, ir.Constant(bits.type, 0x7FFF)))
        return builder.trunc(builder.lshr(bits, sixteen), ir.IntType(16))

    return like(types.float32, like), build


@intrinsic
def as_float(typing: Any, bits: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), build


@intrinsic
def as_bits(typing: Any, x: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), build


@intrinsic
def order(typing: Any, x: Any) -> Any:
    """An integer of x's size that compares as x does: equal for 0 and -0, and beyond the infinities' for NaN."""
    integer = types.int32 if x == types.float32 else types.int16

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(integer)
        bits = builder.bitcast(arguments[0], kind)
        size = builder.and_(bits, ir.Constant(kind, (1 << (kind.width - 1)) - 1))
        negative = builder.icmp_signed("<", bits, ir.Constant(kind, 0))
        return builder.select(negative, builder.neg(size), size)

    return integer(x), build


def ask(builder: Any, address: Any) -> None:
    """Have the line at `address`, which need not be anything's, come to the second-level cache."""
    integer, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, integer, integer, integer])
    prefetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    numbers = [ir.Constant(integer, n) for n in (0, 2, 1)]  # to read, second level, data
    builder.call(prefetch, [builder.inttoptr(address, pointer), *numbers])


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """`ask`, in compiled functions."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ask(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(address), build


@compiled
def prefetch_rows(ahead, row, count, size):
    """Rows `row` to `row + count` of `size` bytes each at the address `ahead`."""
    for line in range(row * size, (row + count) * size, 64):
        prefetch(ahead + line)


_aligned_alloc = types.ExternalFunction("aligned_alloc", types.int64(types.int64, types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))


@compiled
def address_of(array):
    """As int64: the one that numba knows has no sign, and a sum with it would be floating point."""
    return np.int64(array.ctypes.data)


# numba's own arrays need its library at run time
@compiled
def take(shape, like):
    """An array of numbers of the type of `like`, which are not set, until it is given back. It begins with a line: rows
    of tiles that lie across two take twice as long."""
    size = carray(address(0, like), (1,)).itemsize
    for length in shape:
        size *= length
    return carray(address(_aligned_alloc(LINE, -(-size // LINE) * LINE), like), shape)


@compiled
def give_back(array):
    _free(address_of(array))


# loops, since numba compiles the assignment of a slice together with the text of its error
@compiled
def copy(source, target, count, like):
    """`count` numbers of the type of `like` from one address to another."""
    numbers, out = carray(address(source, like), (count,)), carray(address(target, like), (count,))
    for i in range(count):
        out[i] = numbers[i]


@compiled
def fill(target, count, value):
    """`count` numbers at an address become `value`."""
    out = carray(address(target, value), (count,))
    for i in range(count):
        out[i] = value


@compiled
def exp(x):
    """e^x for x <= 0, to 2 units in the last place."""
    power = max(x * np.float32(LOG2_E), np.float32(-126))
    whole = np.floor(power)
    y = power - whole
    series = np.float32(SERIES[0])
    for factor in SERIES[1:]:
        series = series * y + np.float32(factor)
    return series * as_float((np.int32(whole) + np.int32(127)) << np.int32(23))
