"""Attention of prompt rows in tiles of bfloat16 (AMX).

Everything lies transposed, a query in each column: scores are keys times queries, so that maxima and sums run down the
columns in vectors of 16 queries, and pairs of rows of weights are a tile as they are. Keys meet queries at multiples
of 64 and values at multiples of 32 tokens of the text, and what a query must not see has a weight of zero: a query's
result is the same to the bit however a prompt is cut into chunks, and whatever is beside it.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import carray, from_dtype, types

from lpa_model.kernels import columns, tiles
from lpa_model.kernels.machine import ZERO, address, compiled, fetch_add
from lpa_model.kernels.records import PROMPT

LANES = 16  # queries of a tile
PAIR = np.uint32(0)
VALUES = 32  # of a product with weights
LOG2_E = 1.4426950408889634
LOT = 4  # tiles of queries that a thread takes at a time

Room = namedtuple("Room", ["queries", "scores", "keys", "weights", "values", "out", "peaks", "sums"])
"""Addresses of one thread's scratch."""


@compiled
def pair_queries(q, stride, count, width, queries):
    """queries uint32 [width / 2, LANES], two dimensions side by side, from `count` rows at q; all addresses."""
    queries = carray(address(queries, PAIR), (width // 2, LANES))
    for lane in range(count):
        row = carray(address(q + lane * stride, PAIR), (width // 2,))
        for i in range(width // 2):
            queries[i, lane] = row[i]


@compiled
def write_rows(pairs, width, count, out, stride):
    """The inverse: the first `count` columns become rows at `out`."""
    pairs = carray(address(pairs, PAIR), (width // 2, LANES))
    for lane in range(count):
        row = carray(address(out + lane * stride, PAIR), (width // 2,))
        for i in range(width // 2):
            row[i] = pairs[i, lane]


@compiled
def hide(first, count, end, scores):
    """What `count` queries from token `first` on must not see becomes -inf; the other columns see what the last one
    sees. `end` is the last query's own end; so do rows behind it to a multiple of 4."""
    scores = carray(address(scores, ZERO), (end + 3, LANES))
    for t in range(end, -(-end // 4) * 4):
        scores[t] = -np.inf
    for lane in range(LANES):
        for t in range(first + min(lane, count - 1) + 1, end):
            scores[t, lane] = -np.inf


@compiled
def soften(end, scale, room):
    """Weights uint32 [.., LANES], two tokens' side by side, are e^(scale * (score - maximum)); zeros behind `end`."""
    pairs = -(-end // 2)
    columns.maxima(room.scores, -(-end // 4), room.peaks)
    columns.exponentials(room.scores, pairs, room.peaks, np.float32(scale * LOG2_E), room.weights, room.sums)
    weights = carray(address(room.weights, PAIR), (pairs + VALUES // 2, LANES))
    for i in range(pairs, -(-end // VALUES) * VALUES // 2):
        for lane in range(LANES):
            weights[i, lane] = 0


@compiled
def mix(rows, stride, whole, end, spare, d, room):
    """out [d : d + 32, LANES] from 32 rows, of numbers up to `end` each, and as many weights.

    Numbers up to `whole`, a multiple of VALUES, are read where they lie, and what is left, fewer than VALUES, from
    `spare` [32, VALUES].
    """
    tiles.zero(0)
    tiles.zero(1)
    for first in range(0, end, VALUES):
        source, step = rows + 2 * first, stride
        if first >= whole:
            source, step = spare, 2 * VALUES
        tiles.load(4, room.weights + 2 * LANES * first, 64)
        tiles.load(5, source, step)
        tiles.multiply(0, 5, 4)
        tiles.load(6, source + 16 * step, step)
        tiles.multiply(1, 6, 4)
    tiles.store(0, room.out + 4 * LANES * d, 64)
    tiles.store(1, room.out + 4 * LANES * (d + 16), 64)


@compiled
def _copy(source, target, count, like):
    source, target = carray(address(source, like), (count,)), carray(address(target, like), (count,))
    for i in range(count):
        target[i] = source[i]


@compiled
def _score_all(call, keys, end, total, room, like):
    """Scores of tokens up to `end` (and some behind, which are not to be read) of the `total` at address `keys`."""
    for first in range(0, end, tiles.TOKENS):
        rows, stride = keys + first * call.key_stride, call.key_stride
        if first + tiles.TOKENS > total:  # tiles are read whole, and what lies behind may be no memory
            for t in range(total - first):
                _copy(rows + t * stride, room.keys + 2 * t * call.width, call.width, like)
            rows, stride = room.keys, 2 * call.width
        tiles.score(room.queries, rows, stride, call.width, room.scores + 4 * LANES * first, 0)


@compiled
def _hide_branches(call, first, count, scores):
    """The tokens of other branches become -inf."""
    starts = carray(address(call.shared_ends, 0), (call.length,))
    ends = carray(address(call.own_starts, 0), (call.length,))
    scores = carray(address(scores, ZERO), (call.context + call.length, LANES))
    for lane in range(LANES):
        query = first + min(lane, count - 1)
        for t in range(starts[query], ends[query]):
            scores[t, lane] = -np.inf


@compiled
def _spare_values(call, values, total, room, like):
    """The last values, fewer than VALUES, of all dimensions [width, VALUES], and zeros behind them."""
    first = total // VALUES * VALUES
    for i in range(call.width):
        _copy(values + i * call.value_stride + 2 * first, room.values + 2 * i * VALUES, total - first, like)
        spare = carray(address(room.values + 2 * i * VALUES, like), (VALUES,))
        for t in range(total - first, VALUES):
            spare[t] = 0


@compiled
def _attend(call, text, head, first, room, like):
    """A tile of queries, from the `first` of a text on."""
    count = min(LANES, call.length - first)
    row = text * call.length + first
    total = call.context + call.length
    end = call.context + first + count
    group = head // (call.heads // call.key_heads)
    pair_queries(call.q + row * call.q_stride + 2 * head * call.width, call.q_stride, count, call.width, room.queries)
    keys = call.keys + text * total * call.key_stride + 2 * group * call.width
    _score_all(call, keys, end, total, room, like)
    hide(call.context + first, count, end, room.scores)
    if call.shared_ends:
        _hide_branches(call, first, count, room.scores)
    soften(end, call.scale, room)
    values = call.values + group * call.width * call.value_stride + 2 * text * total
    whole = end
    if -(-end // VALUES) * VALUES > total:  # tiles are read whole, and what lies behind is another text's
        whole = total // VALUES * VALUES
        _spare_values(call, values, total, room, like)
    for d in range(0, call.width, 32):
        mix(values + d * call.value_stride, call.value_stride, whole, end, room.values + 2 * VALUES * d, d, room)
    columns.shares(room.out, call.width // 2, room.sums, room.weights)
    out = call.out + row * call.out_stride + 2 * head * call.width
    write_rows(room.weights, call.width, count, out, call.out_stride)


@compiled
def _work(call, like):
    longest = -(-(call.context + call.length) // tiles.TOKENS) * tiles.TOKENS + 1
    queries = np.zeros((call.width // 2, LANES), np.uint32)
    scores = np.empty((longest, LANES), np.float32)
    keys = np.zeros((tiles.TOKENS, call.width), np.uint16)
    weights = np.empty((max(longest, call.width) // 2 + VALUES // 2, LANES), np.uint32)
    values = np.empty((call.width, VALUES), np.uint16)
    out = np.empty((call.width, LANES), np.float32)
    rows = np.empty((2, LANES), np.float32)
    room = Room(
        queries.ctypes.data,
        scores.ctypes.data,
        keys.ctypes.data,
        weights.ctypes.data,
        values.ctypes.data,
        out.ctypes.data,
        rows.ctypes.data,
        rows.ctypes.data + 4 * LANES,
    )
    lots = -(-call.length // (LANES * LOT))
    tiles.configure()
    while True:
        item = fetch_add(call.counter)
        if item >= call.batch * call.heads * lots:
            break
        lot = lots - 1 - item // (call.batch * call.heads)  # long ones first
        text, head = item // call.heads % call.batch, item % call.heads
        for tile in range(LOT * lot, LOT * lot + LOT):
            if tile * LANES < call.length:
                _attend(call, text, head, tile * LANES, room, like)
    tiles.release()
    return scores[0, 0] + keys[0, 0] + weights[0, 0] + values[0, 0] + out[0, 0] + rows[0, 0] + queries[0, 0]  # alive


SIGNATURE = types.void(types.CPointer(from_dtype(PROMPT)))


def attend_bfloat16(call):
    _work(carray(call, (1,))[0], np.uint16(0))
