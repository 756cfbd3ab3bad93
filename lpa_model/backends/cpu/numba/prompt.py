"""Attention of prompt rows: new tokens of some texts, whose earlier tokens are in the cache.

Products are in tiles of bfloat16 (AMX), or in vectors where `tiled` is None.

Everything lies transposed, a query in each column: scores are keys times queries, so that maxima and sums run down the
columns in vectors, and pairs of rows of weights are a tile as they are. Keys are read where they lie in the cache;
values are copied once for all heads, into tiles. Tokens are met BLOCK at a time from multiples of BLOCK in the text,
each block's weights beneath the largest score so far (a little larger ones pass, so that sums are seldom rescaled), and
what a query must not see has a weight of zero: a query's result is the same to the bit however a prompt is cut into
chunks, and whatever is beside it.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import carray

from lpa_model.backends.cpu.numba import columns, paired, tiles
from lpa_model.backends.cpu.numba.columns import COLUMNS, ROW
from lpa_model.backends.cpu.numba.machine import LOG2_E, ZERO, address, compiled, copy, fill
from lpa_model.backends.cpu.numba.records import SPAN_FIELDS

TOKENS = 32  # of a tile's products
BLOCK = 128  # tokens whose scores stay in the first-level cache
LOT = 2  # tiles of COLUMNS queries that a thread takes at a time
MARGIN = 8  # powers of two by which a weight may exceed 1
LOWEST = np.float32(-1e30)  # below all scores, and finite

Room = namedtuple("Room", ["queries", "scores", "weights", "out", "found", "peaks", "sums", "factors"])
"""Addresses of one thread's scratch."""


@compiled
def room_rows(widest):
    """How many rows of COLUMNS numbers `room` needs."""
    return widest // 2 + BLOCK + max(BLOCK, widest) // 2 + widest + 4


@compiled
def room(widest, start):
    """Such rows at `start` as a Room."""
    scores = start + ROW * (widest // 2)
    weights = scores + ROW * BLOCK
    out = weights + ROW * (max(BLOCK, widest) // 2)
    rest = out + ROW * widest
    return Room(start, scores, weights, out, rest, rest + ROW, rest + 2 * ROW, rest + 3 * ROW)


@compiled
def write_row(call, item, like):
    """Turn a row's queries, and write its key and value into the cache."""
    row = call.rows + item
    position = carray(address(call.prompt_positions, 0), (call.prompt_rows,))[item]
    slot = carray(address(call.prompt_slots, 0), (call.prompt_rows,))[item]
    if call.turns:
        queries = call.q + 2 * row * call.heads * call.key_width
        turn_heads(call, position, queries, call.heads, queries)
    write_token(call, row, position, slot // call.block_size, slot % call.block_size, like)


@compiled
def turn_heads(call, position, heads, count, out):
    """`count` heads bfloat16 [count, key_width] turn by a token's position."""
    turns = call.turns + 4 * position * call.key_width
    for h in range(count):
        skipped = 2 * h * call.key_width
        columns.turn(heads + skipped, turns, call.key_width // 16, out + skipped)


@compiled
def write_token(call, row, position, block, offset, like):
    """A row's key, turned where positions are rotary, and its value, beside its neighbour's, into the cache."""
    width = call.key_width
    turns = call.turns + 4 * position * width
    for h in range(call.key_heads):
        new = call.new_keys + 2 * (row * call.key_stride + h * width)
        key = call.keys + 2 * width * ((block * call.key_heads + h) * call.block_size + offset)
        if call.turns:
            columns.turn(new, turns, width // 16, key)
        else:
            copy(new, key, width, like)
    width = call.value_width
    for h in range(call.value_heads):
        new = call.new_values + 2 * (row * call.value_stride + h * width)
        value = call.values + 2 * width * ((block * call.value_heads + h) * call.block_size + offset // 2 * 2)
        columns.set_halves(new, width // 16, offset % 2, value)


@compiled
def tile_values(call, item, like):
    """A block's values into the tiles of its text, [value_heads * width / 16, columns / TOKENS, 16, TOKENS], and zeros
    behind the text's last one."""
    span = carray(address(call.block_spans, 0), (call.prompt_blocks,))[item]
    context, length, table, column, first = carray(address(call.spans, 0), (call.num_spans, SPAN_FIELDS))[span, 1:6]
    start = (item - first) * call.block_size  # in the text
    block = carray(address(call.prompt_tables, 0), (1 << 30,))[table + item - first]
    count = min(call.block_size, context + length - start)
    width, size = call.value_width, call.block_size * call.value_width
    for h in range(call.value_heads):
        source = call.values + 2 * (block * call.value_heads + h) * size
        for t in range(0, count, TOKENS):
            for d in range(0, width, 16):
                strip = (h * width + d) // 16 * call.value_tiles_in_row
                tile = call.tiled_values + 1024 * (strip + (column + start + t) // TOKENS)
                columns.to_rows(source + 2 * t * width + 4 * d, 4 * width, 16, tile, 64)
                if count - t < TOKENS:
                    halves = carray(address(tile, like), (16, TOKENS))
                    for i in range(16):
                        for j in range(count - t, TOKENS):
                            halves[i, j] = 0


@compiled
def items(call):
    """How many pieces of work the attention has."""
    return call.prompt_lots * call.heads


@compiled
def attend(call, item, room, tiled):
    """LOT tiles of a head's queries."""
    lot, head = item // call.heads, item % call.heads
    span, tile = carray(address(call.lots, 0), (call.prompt_lots, 2))[lot]
    length = carray(address(call.spans, 0), (call.num_spans, SPAN_FIELDS))[span, 2]
    for first in range(tile * COLUMNS, min((tile + LOT) * COLUMNS, length), COLUMNS):
        _attend_tile(call, span, head, first, room, tiled)


@compiled
def _attend_tile(call, span, head, first, room, tiled):
    start, context, length, table, column = carray(address(call.spans, 0), (call.num_spans, SPAN_FIELDS))[span, :5]
    count = min(COLUMNS, length - first)
    row, end = call.rows + start + first, context + first + count
    width = call.key_width
    _take_queries(call.q + 2 * (row * call.heads + head) * width, 2 * call.heads * width, count, width, room.queries)
    tables = carray(address(call.prompt_tables, 0), (1 << 30,))
    group = head // (call.heads // call.key_heads)
    strip = head // (call.heads // call.value_heads) * call.value_width // 16 * call.value_tiles_in_row
    values, next_strip = call.tiled_values + 1024 * (strip + column // TOKENS), 1024 * call.value_tiles_in_row
    fill(room.peaks, COLUMNS, LOWEST)
    fill(room.sums, COLUMNS, ZERO)
    for begin in range(0, end, BLOCK):
        some = min(BLOCK, end - begin)
        for at in range(begin, begin + some, TOKENS):
            block, offset = tables[table + at // call.block_size], at % call.block_size
            keys = call.keys + 2 * width * ((block * call.key_heads + group) * call.block_size + offset)
            scores = room.scores + ROW * (at - begin)
            _multiply(keys, 2 * width, 64, 32 * width, width, True, room.queries, scores, tiled)
        _hide_later(context + first + 1 - begin, some, room.scores)
        if call.shared_ends:
            _hide_branches(call, start + first, count, begin, some, room.scores)
        raised = _soften(some, call.scale, room)
        if raised and begin:
            columns.multiply(room.out, call.value_width, room.factors)
        for d in range(0, call.value_width, 32):
            rows = values + d // 16 * next_strip + 1024 * (begin // TOKENS)
            _multiply(rows, 64, 1024, next_strip, some, begin == 0, room.weights, room.out + ROW * d, tiled)
    columns.shares(room.out, call.value_width // 2, room.sums, room.weights)
    size = 2 * call.value_width
    _write_rows(room.weights, call.value_width, count, call.out + (row * call.heads + head) * size, call.heads * size)


@compiled
def _take_queries(q, stride, count, width, queries):
    """queries uint32 [width / 2, COLUMNS], two dimensions side by side, from `count` rows at q."""
    for first in range(0, COLUMNS, 16):
        there = min(max(count - first, 1), 16)
        rows = q + min(first, count - 1) * stride
        for i in range(0, width // 2, 16):
            columns.from_rows(rows + 4 * i, stride, there, queries + ROW * i + 4 * first, ROW)


@compiled
def _write_rows(pairs, width, count, out, stride):
    """The inverse: the first `count` columns become rows at `out`."""
    for first in range(0, count, 16):
        for i in range(0, width // 2, 16):
            columns.to_rows(pairs + ROW * i + 4 * first, ROW, count - first, out + first * stride + 4 * i, stride)


@compiled
def _hide_later(own, count, scores):
    """What comes after each query's own token, the first one's being before row `own` of `count`, becomes -inf."""
    skipped = max(0, -own)
    if own < count:
        columns.hide(scores + ROW * (own + skipped), skipped, count - own - skipped)


@compiled
def _hide_branches(call, first, count, begin, some, scores):
    """The tokens of other branches become -inf for each query; those of no query see what the last one sees."""
    starts = carray(address(call.shared_ends, 0), (call.prompt_rows,))
    ends = carray(address(call.own_starts, 0), (call.prompt_rows,))
    scores = carray(address(scores, ZERO), (some, COLUMNS))
    for lane in range(COLUMNS):
        query = first + min(lane, count - 1)
        for t in range(max(starts[query] - begin, 0), min(ends[query] - begin, some)):
            scores[t, lane] = -np.inf


@compiled
def _soften(count, scale, room):
    """Weights uint32 [.., COLUMNS], two tokens' side by side, are e^(scale * (score - peak)); zeros from `count` on.

    Whether any peak had to be raised.
    """
    pairs, power = -(-count // 2), np.float32(scale * LOG2_E)
    if count % 2:
        fill(room.scores + ROW * count, COLUMNS, np.float32(-np.inf))  # the other half of the last pair
    columns.maxima(room.scores, pairs, room.found)
    raised = columns.raise_peaks(room.found, np.float32(MARGIN) / power, power, room.peaks, room.sums, room.factors)
    columns.exponentials(room.scores, pairs, room.peaks, power, room.weights, room.sums)
    rest = -(-count // TOKENS) * TOKENS // 2 - pairs
    fill(room.weights + ROW * pairs, rest * COLUMNS, ZERO)
    return raised


@compiled
def _multiply(rows, stride, step, strip, count, fresh, columns, out, tiled):
    """See `tiles.multiply_columns`: `count` numbers of each row and column, and zeros behind them."""
    parts = -(-count // TOKENS)
    if tiled is None:
        paired.multiply_columns(rows, stride, step, strip, parts, fresh, columns, out)
    else:
        tiles.multiply_columns(rows, stride, step, strip, parts, fresh, columns, out)
