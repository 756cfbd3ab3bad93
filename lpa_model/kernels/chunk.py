"""Prompt rows of a program: a few new tokens of some texts, whose earlier tokens are in the cache.

As in `prompt` everything lies transposed. Keys are read where they lie in the cache, 64 tokens at a time; values are
transposed once for all heads. Values that are latents are rebuilt behind the softmax, for each query.
"""

from __future__ import annotations

from collections import namedtuple

from numba import carray

from lpa_model.kernels import columns, decode, tiles
from lpa_model.kernels.machine import ZERO, address, compiled, widen
from lpa_model.kernels.prompt import LANES, LOT, VALUES, hide, mix, pair_queries, soften, write_rows
from lpa_model.kernels.records import SPAN_FIELDS

Room = namedtuple("Room", ["queries", "scores", "weights", "out", "peaks", "sums", "ones"])
"""Addresses of one thread's scratch."""


@compiled
def write_row(call, item, like):
    """Turn a row's queries, and write its key and value into the cache."""
    row = call.rows + item
    position = carray(address(call.prompt_positions, 0), (call.prompt_rows,))[item]
    slot = carray(address(call.prompt_slots, 0), (call.prompt_rows,))[item]
    keys = carray(address(call.keys, like), (1 << 30, call.key_heads, call.block_size, call.key_width))
    values = carray(address(call.values, like), (1 << 30, call.value_heads, call.block_size, call.value_width))
    block, offset = slot // call.block_size, slot % call.block_size
    decode.write_new_token(call, row, position, keys, values, block, offset, like)
    if call.turns:
        turns = carray(address(call.turns + 4 * position * call.key_width, ZERO), (call.key_width,))
        for h in range(call.heads):
            q = carray(address(call.q + 2 * (row * call.heads + h) * call.key_width, like), (call.key_width,))
            decode.turn(q, turns, q, like)


@compiled
def transpose_block(call, item, like):
    """A block's values into the columns of its text, and zeros behind the last one, to a multiple of VALUES."""
    span = carray(address(call.block_spans, 0), (call.prompt_blocks,))[item]
    context, length, table, column, first = carray(address(call.spans, 0), (call.num_spans, SPAN_FIELDS))[span, 1:6]
    at = item - first  # which block of the text
    block = carray(address(call.prompt_tables, 0), (1 << 30,))[table + at]
    count = min(call.block_size, context + length - at * call.block_size)
    size = call.block_size * call.value_width
    for h in range(call.value_heads):
        source = carray(
            address(call.values + 2 * (block * call.value_heads + h) * size, like), (call.block_size, call.value_width)
        )
        for d in range(call.value_width):
            start = call.transposed + (h * call.value_width + d) * call.transposed_stride
            target = carray(address(start + 2 * (column + at * call.block_size), like), (call.block_size,))
            for t in range(count):
                target[t] = source[t, d]
            for t in range(count, -(-count // VALUES) * VALUES):
                target[t] = 0


@compiled
def items(call):
    """How many pieces of work the attention has."""
    return call.prompt_lots * call.heads


@compiled
def attend(call, item, room, like):
    """LOT tiles of a head's queries."""
    lot, head = item // call.heads, item % call.heads
    span, tile = carray(address(call.lots, 0), (call.prompt_lots, 2))[lot]
    length = carray(address(call.spans, 0), (call.num_spans, SPAN_FIELDS))[span, 2]
    for first in range(tile * LANES, min((tile + LOT) * LANES, length), LANES):
        _attend_tile(call, span, head, first, room, like)


@compiled
def _attend_tile(call, span, head, first, room, like):
    fields = carray(address(call.spans, 0), (call.num_spans, SPAN_FIELDS))
    start, context, length, table, column = fields[span, :5]
    count = min(LANES, length - first)
    end = context + first + count
    row = call.rows + start + first
    width = call.key_width
    pair_queries(call.q + 2 * (row * call.heads + head) * width, 2 * call.heads * width, count, width, room.queries)
    tables = carray(address(call.prompt_tables, 0), (1 << 30,))
    group = head // (call.heads // call.key_heads)
    for at in range(0, end, tiles.TOKENS):
        block, offset = tables[table + at // call.block_size], at % call.block_size
        keys = call.keys + 2 * width * ((block * call.key_heads + group) * call.block_size + offset)
        tiles.score(room.queries, keys, 2 * width, width, room.scores + 4 * LANES * at, 0)
    hide(context + first, count, end, room.scores)
    soften(end, call.scale, room)
    values = call.transposed + head // (call.heads // call.value_heads) * call.value_width * call.transposed_stride
    for d in range(0, call.value_width, 32):
        mix(values + d * call.transposed_stride + 2 * column, call.transposed_stride, end, end, 0, d, room)
    columns.shares(room.out, call.value_width // 2, room.sums, room.weights)
    size = call.value_width
    if call.up:
        size = call.up_width
        _rebuild(call, head // (call.heads // call.up_heads), room, like)
    out = call.out + 2 * (row * call.heads + head) * size
    write_rows(room.weights, size, count, out, 2 * call.heads * size)


@compiled
def _rebuild(call, head, room, like):
    """Pairs of rows of weights [value_width, LANES] become such of up [up_width, value_width] times these."""
    stride = 2 * call.value_width
    for d in range(0, call.up_width, 32):
        rows = call.up + (head * call.up_width + d) * stride
        mix(rows, stride, call.value_width, call.value_width, 0, d, room)
    if call.up_bias:
        bias = carray(address(call.up_bias + 2 * head * call.up_width, like), (call.up_width,))
        out = carray(address(room.out, ZERO), (call.up_width, LANES))
        for d in range(call.up_width):
            for lane in range(LANES):
                out[d, lane] += widen(bias[d])
    columns.shares(room.out, call.up_width // 2, room.ones, room.weights)
