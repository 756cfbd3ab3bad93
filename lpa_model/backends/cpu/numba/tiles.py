"""Products of bfloat16 tiles (AMX): all heads that share a latent meet its tokens at once.

A tile is 16 rows of 64 bytes. `tdpbf16ps` adds to a tile [16, 16] of float32 the product of a tile [16, 32] of
bfloat16 and one [32, 16] in which rows 2i and 2i + 1 lie side by side, as [16, 16, 2].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from lpa_model.backends.cpu.numba.machine import address_of, compiled, fill, give_back, prefetch_rows, take

ROWS = 16  # of a tile
TOKENS = 64  # whose keys are met at a time: a block has to be a multiple of this


def _instruction(name: str, tiles: list[Any], kinds: list[Any]) -> Any:
    """An x86 instruction on tiles whose numbers are literals, and an address and a stride, or neither."""
    numbers = [ir.Constant(ir.IntType(8), tile.literal_value) for tile in tiles]
    pointer, integer = ir.IntType(8).as_pointer(), ir.IntType(64)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = list(numbers)
        if kinds:
            values.append(builder.inttoptr(arguments[len(tiles)], pointer))
            values += arguments[len(tiles) + 1 :]
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8)] * len(tiles) + [pointer, integer][: len(kinds)])
        builder.call(get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), values)
        return context.get_dummy_value()

    return types.void(*tiles, *kinds), build


@intrinsic(prefer_literal=True)
def load(typing: Any, tile: Any, address: Any, stride: Any) -> Any:
    """16 rows of 64 bytes, `stride` bytes apart."""
    return _instruction("tileloadd64", [tile], [types.int64, types.int64])


@intrinsic(prefer_literal=True)
def stream(typing: Any, tile: Any, address: Any, stride: Any) -> Any:
    """As `load`, of what is not needed again soon: it pushes nothing out of the first-level cache."""
    return _instruction("tileloaddt164", [tile], [types.int64, types.int64])


@intrinsic(prefer_literal=True)
def store(typing: Any, tile: Any, address: Any, stride: Any) -> Any:
    return _instruction("tilestored64", [tile], [types.int64, types.int64])


@intrinsic(prefer_literal=True)
def zero(typing: Any, tile: Any) -> Any:
    return _instruction("tilezero", [tile], [])


@intrinsic(prefer_literal=True)
def multiply(typing: Any, total: Any, left: Any, right: Any) -> Any:
    """total += left . right."""
    return _instruction("tdpbf16ps", [total, left, right], [])


@intrinsic
def _configure(typing: Any, address: Any) -> Any:
    return _instruction("ldtilecfg", [], [types.int64])


@intrinsic
def release(typing: Any) -> Any:
    return _instruction("tilerelease", [], [])


@compiled
def configure():
    """Make this thread's tiles whole ones, until it releases them."""
    settings = take((64,), np.uint8(0))
    fill(address_of(settings), 64, np.uint8(0))
    settings[0] = 1  # the palette
    for tile in range(8):
        settings[16 + 2 * tile] = 64  # bytes in a row
        settings[48 + tile] = 16  # rows
    _configure(address_of(settings))
    give_back(settings)


@compiled
def zero_square():
    """Tiles 0 to 3, a square of 32 rows and columns: 0 and 1 side by side, 2 and 3 below them."""
    zero(0)
    zero(1)
    zero(2)
    zero(3)


@compiled
def load_square(address, stride):
    """Tiles 0 to 3 from float32 [32, 32], its rows `stride` bytes apart."""
    load(0, address, stride)
    load(1, address + 64, stride)
    load(2, address + 16 * stride, stride)
    load(3, address + 16 * stride + 64, stride)


@compiled
def store_square(address, stride):
    store(0, address, stride)
    store(1, address + 64, stride)
    store(2, address + 16 * stride, stride)
    store(3, address + 16 * stride + 64, stride)


@compiled
def multiply_columns(rows, stride, step, strip, parts, fresh, columns, out):
    """out float32 [32, 32] from 32 rows of 32 * parts numbers times uint32 [16 * parts, 32], two numbers of a column
    side by side; added to what is there if not `fresh`.

    The rows lie `stride` bytes apart, 16 of them `strip`, and 32 numbers in a row `step`.
    """
    if fresh:
        zero_square()
    else:
        load_square(out, 128)
    for i in range(parts):
        right, source = columns + 2048 * i, rows + step * i
        load(4, right, 128)
        stream(6, source, stride)
        multiply(0, 6, 4)
        load(5, right + 64, 128)
        multiply(1, 6, 5)
        stream(7, source + strip, stride)
        multiply(2, 7, 4)
        multiply(3, 7, 5)
    store_square(out, 128)


@compiled
def score(queries, keys, width, found, ahead, also, lines):
    """found float32 [TOKENS, 16] from TOKENS rows of keys [width] and queries [width / 2, 16, 2], two dimensions side
    by side; all addresses. As many rows at `ahead` are prefetched, and with every 32 of the width `lines` bytes of what
    is at `also`."""
    stride = 2 * width
    zero_square()
    for i in range(width // 32):
        prefetch_rows(ahead, i, 1, 64 * TOKENS)
        prefetch_rows(also, i, 1, lines)
        load(4, queries + 1024 * i, 64)
        load(5, keys + 64 * i, stride)
        multiply(0, 5, 4)
        load(6, keys + 64 * i + 16 * stride, stride)
        multiply(1, 6, 4)
        load(5, keys + 64 * i + 32 * stride, stride)
        multiply(2, 5, 4)
        load(6, keys + 64 * i + 48 * stride, stride)
        multiply(3, 6, 4)
    store(0, found, 64)
    store(1, found + 1024, 64)
    store(2, found + 2048, 64)
    store(3, found + 3072, 64)


def _weighing(weights):
    """Tiles 0 and 1 += a tile of weights . values [32, 32], two rows side by side, rows `stride` bytes apart."""

    @compiled
    def weigh(values, stride):
        load(6, values, stride)
        multiply(0, weights, 6)
        load(7, values + 64, stride)
        multiply(1, weights, 7)

    return weigh


_weigh_first, _weigh_second, _weigh_third, _weigh_fourth = (_weighing(tile) for tile in (2, 3, 4, 5))


@compiled
def mix(weights, step, values, steps, width, out, ahead, lines):
    """out float32 [16, width] = weights bfloat16 [16, 32 * steps], rows `step` bytes apart, . values: those are at as
    many addresses, each of [16, width, 2], two tokens' side by side. With every 32 of the width `lines` bytes of what
    is at `ahead` are asked for."""
    row = 4 * width
    for first in range(0, steps, 4):
        some, left = min(4, steps - first), weights + 64 * first
        load(2, left, step)
        if some > 1:
            load(3, left + 64, step)
        if some > 2:
            load(4, left + 128, step)
        if some > 3:
            load(5, left + 192, step)
        for j in range(width // 32):
            at, to = 128 * j, out + 128 * j
            if first:
                load(0, to, row)
                load(1, to + 64, row)
            else:
                prefetch_rows(ahead, j, 1, lines)
                zero(0)
                zero(1)
            _weigh_first(values[first] + at, row)
            if some > 1:
                _weigh_second(values[first + 1] + at, row)
            if some > 2:
                _weigh_third(values[first + 2] + at, row)
            if some > 3:
                _weigh_fourth(values[first + 3] + at, row)
            store(0, to, row)
            store(1, to + 64, row)
