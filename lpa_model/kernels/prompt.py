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
KEYS = 64  # of a product with queries
VALUES = 32  # of a product with weights
LOT = 4  # tiles of queries that a thread takes at a time

Room = namedtuple("Room", ["queries", "scores", "keys", "weights", "values", "out", "peaks", "sums"])
"""Addresses of one thread's scratch."""


@compiled
def _pair_queries(call, row, head, count, queries):
    """queries uint32 [width / 2, LANES], two dimensions side by side, from rows `row` to `row + count`."""
    queries = carray(address(queries, PAIR), (call.width // 2, LANES))
    for lane in range(count):
        q = carray(address(call.q + (row + lane) * call.q_stride + 2 * head * call.width, PAIR), (call.width // 2,))
        for i in range(call.width // 2):
            queries[i, lane] = q[i]


@compiled
def _score(call, keys, end, total, room, like):
    """Scores of tokens up to `end` (and some behind, which are not to be read) of the `total` at address `keys`."""
    width = call.width
    queries = room.queries
    for first in range(0, end, KEYS):
        rows, stride = keys + first * call.key_stride, call.key_stride
        if first + KEYS > total:  # tiles are read whole, and what lies behind may be no memory
            for t in range(total - first):
                _copy(rows + t * stride, room.keys + 2 * t * width, width, like)
            rows, stride = room.keys, 2 * width
        tiles.zero(0)
        tiles.zero(1)
        tiles.zero(2)
        tiles.zero(3)
        for i in range(width // 32):
            tiles.load(4, queries + 1024 * i, 64)
            tiles.load(5, rows + 64 * i, stride)
            tiles.multiply(0, 5, 4)
            tiles.load(6, rows + 64 * i + 16 * stride, stride)
            tiles.multiply(1, 6, 4)
            tiles.load(5, rows + 64 * i + 32 * stride, stride)
            tiles.multiply(2, 5, 4)
            tiles.load(6, rows + 64 * i + 48 * stride, stride)
            tiles.multiply(3, 6, 4)
        found = room.scores + 4 * LANES * first
        tiles.store(0, found, 64)
        tiles.store(1, found + 1024, 64)
        tiles.store(2, found + 2048, 64)
        tiles.store(3, found + 3072, 64)


@compiled
def _copy(source, target, count, like):
    source, target = carray(address(source, like), (count,)), carray(address(target, like), (count,))
    for i in range(count):
        target[i] = source[i]


@compiled
def _hide(call, first, count, end, scores):
    """What a query must not see becomes -inf; columns without a query see what the last one sees."""
    scores = carray(address(scores, ZERO), (end + 1, LANES))
    scores[end] = -np.inf  # the other half of the last pair
    for lane in range(LANES):
        query = first + min(lane, count - 1)
        for t in range(call.context + query + 1, end):
            scores[t, lane] = -np.inf
        if call.shared_ends:
            begin = carray(address(call.shared_ends, 0), (call.length,))[query]
            for t in range(begin, carray(address(call.own_starts, 0), (call.length,))[query]):
                scores[t, lane] = -np.inf


@compiled
def _soften(call, end, room):
    """Weights uint32 [.., LANES], two tokens' side by side, are e^(scale * (score - maximum)); zeros behind `end`."""
    pairs = -(-end // 2)
    columns.maxima(room.scores, end, room.peaks)
    columns.exponentials(room.scores, pairs, room.peaks, np.float32(call.scale), room.weights, room.sums)
    weights = carray(address(room.weights, PAIR), (pairs + VALUES // 2, LANES))
    for i in range(pairs, -(-end // VALUES) * VALUES // 2):
        for lane in range(LANES):
            weights[i, lane] = 0


@compiled
def _mix(call, values, end, total, room, like):
    """out float32 [width, LANES] from values [width, total] at an address and the weights, up to token `end`."""
    stride = call.value_stride
    for d in range(0, call.width, 32):
        tiles.zero(0)
        tiles.zero(1)
        for first in range(0, end, VALUES):
            rows, step = values + d * stride + 2 * first, stride
            if first + VALUES > total:
                for i in range(32):
                    _copy(rows + i * step, room.values + 2 * i * VALUES, total - first, like)
                    spare = carray(address(room.values + 2 * i * VALUES, like), (VALUES,))
                    for t in range(total - first, VALUES):
                        spare[t] = 0
                rows, step = room.values, 2 * VALUES
            tiles.load(4, room.weights + 2 * LANES * first, 64)
            tiles.load(5, rows, step)
            tiles.multiply(0, 5, 4)
            tiles.load(6, rows + 16 * step, step)
            tiles.multiply(1, 6, 4)
        found = room.out + 4 * LANES * d
        tiles.store(0, found, 64)
        tiles.store(1, found + 1024, 64)


@compiled
def _attend(call, text, head, first, room, like):
    """A tile of queries, from the `first` of a text on."""
    count = min(LANES, call.length - first)
    row = text * call.length + first
    total = call.context + call.length
    end = call.context + first + count
    group = head // (call.heads // call.key_heads)
    _pair_queries(call, row, head, count, room.queries)
    keys = call.keys + text * total * call.key_stride + 2 * group * call.width
    _score(call, keys, end, total, room, like)
    _hide(call, first, count, end, room.scores)
    _soften(call, end, room)
    values = call.values + group * call.width * call.value_stride + 2 * text * total
    _mix(call, values, end, total, room, like)
    columns.shares(room.out, call.width // 2, room.sums, room.weights)
    shares = carray(address(room.weights, PAIR), (call.width // 2, LANES))
    for lane in range(count):
        out = carray(
            address(call.out + (row + lane) * call.out_stride + 2 * head * call.width, PAIR), (call.width // 2,)
        )
        for i in range(call.width // 2):
            out[i] = shares[i, lane]


@compiled
def _work(call, like):
    longest = -(-(call.context + call.length) // KEYS) * KEYS + 1
    queries = np.zeros((call.width // 2, LANES), np.uint32)
    scores = np.empty((longest, LANES), np.float32)
    keys = np.zeros((KEYS, call.width), np.uint16)
    weights = np.empty((max(longest, call.width) // 2 + VALUES // 2, LANES), np.uint32)
    values = np.empty((32, VALUES), np.uint16)
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
