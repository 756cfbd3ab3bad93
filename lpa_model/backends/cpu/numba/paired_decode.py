"""Decode attention of a program: as `decode`, in products of pairs of bfloat16, and with weights rounded to it.

Scores are products of vectors, or of tiles where all heads share the keys. Values lie in the cache two tokens side by
side, as [blocks, value_heads, block_size / 2, value_width, 2]: so they are an operand as they are.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import carray

from lpa_model.backends.cpu.numba import columns, decode, paired, prompt, singles, tiles
from lpa_model.backends.cpu.numba.machine import (
    LINE,
    ZERO,
    address,
    address_of,
    compiled,
    copy,
    fetch_add,
    fill,
    give_back,
    narrow,
    part,
    prefetch_rows,
    take,
)

STEP = 32  # tokens that a row of a tile holds

Room = namedtuple("Room", ["queries", "pairs", "found", "scores", "weights", "steps", "last", "total"])
"""One thread's scratch."""


@compiled
def _room(call):
    tokens, rows = call.tile_blocks * call.block_size, max(call.heads, tiles.ROWS)
    room = Room(
        take((call.heads, call.key_width), np.uint16(0)),
        take((call.key_width // 2, tiles.ROWS), np.uint32(0)),
        take((tiles.TOKENS, tiles.ROWS), ZERO),
        take((call.heads, tokens), ZERO),
        take((rows, tokens), np.uint16(0)),
        take((tokens // STEP,), 0),
        take((STEP // 2, call.value_width), np.uint32(0)),
        take((rows, call.value_width), ZERO),
    )
    fill(address_of(room.weights), room.weights.size, np.uint16(0))  # rows beyond the heads stay so
    return room


@compiled
def _give_back(room):
    give_back(room.queries)
    give_back(room.pairs)
    give_back(room.found)
    give_back(room.scores)
    give_back(room.weights)
    give_back(room.steps)
    give_back(room.last)
    give_back(room.total)


@compiled
def _prepare_queries(call, row, position, room, in_tiles):
    """The address of the row's queries, turned where positions are rotary; as pairs, too, for tiles of scores."""
    queries = call.q + 2 * row * call.heads * call.key_width
    if call.turns:
        prompt.turn_heads(call, position, queries, call.heads, address_of(room.queries))
        queries = address_of(room.queries)
    if in_tiles:
        pairs = address_of(room.pairs)
        for i in range(0, call.key_width // 2, tiles.ROWS):
            columns.from_rows(queries + 4 * i, 2 * call.key_width, call.heads, pairs + LINE * i, LINE)
    return queries


@compiled
def _lines(size, pieces):
    """Bytes of whole lines in each of so many pieces of `size` bytes."""
    return -(-size // (LINE * pieces)) * LINE


@compiled
def _score(call, queries, keys, tokens, at, room, ahead, values):
    """Queries . keys of a block, both addresses -> room.scores[:, at : at + tokens], 16 keys at a time: some behind the
    last one too. What lies at `ahead`, as much as a head's keys, is prefetched, and the block's `values`."""
    group, size, parts = call.heads // call.key_heads, 2 * call.key_width, call.key_width // 32
    side, line = singles.SIDE, room.scores.strides[0]
    lots = -(-tokens // 16)
    more = _lines(2 * call.value_heads * tokens * call.value_width, call.key_heads * lots)
    for k in range(call.key_heads):
        rows, end = keys + k * call.block_size * size, (k + 1) * group
        soon = ahead if k + 1 == call.key_heads else rows + call.block_size * size
        for t in range(0, tokens, 16):
            some, found = rows + t * size, address_of(room.scores) + 4 * (at + t)
            prefetch_rows(values, k * lots + t // 16, 1, more)
            if group < side:
                prefetch_rows(soon, t, 16, size)
                for h in range(k * group, end):
                    singles.score(queries + h * size, some, size, parts, found + h * line)
            else:
                for j in range(0, 16, side):
                    for own in range(0, group, side):
                        h, row = k * group + min(own, group - side), t + j + own // 2
                        first, to = queries + h * size, found + h * line + 4 * j
                        soon_rows = soon + row * size if own < 2 * side else first
                        singles.score_square(first, some + j * size, size, parts, to, line, soon_rows)


@compiled
def _score_in_tiles(call, keys, at, room, ahead, values):
    """The same of keys that all heads share, for all tokens of the block."""
    size, found = 2 * call.key_width, address_of(room.found)
    for first in range(0, call.block_size, tiles.TOKENS):
        skipped, more = first * size, 2 * first * call.value_width
        soon, also = ahead + skipped, values + more
        lines = _lines(2 * tiles.TOKENS * call.value_width, call.key_width // 32)
        tiles.score(address_of(room.pairs), keys + skipped, call.key_width, found, soon, also, lines)
        for t in range(0, tiles.TOKENS, 16):
            scores = address_of(room.scores) + 4 * (at + first + t)
            columns.to_rows(found + LINE * t, LINE, call.heads, scores, room.scores.strides[0])


@compiled
def _take_values(call, head, table, tokens, room):
    """The addresses of a head's values, STEP tokens at a time, in room.steps.

    What nobody has written need not be a number: the last ones are copied, if a step is not full, and zeros with them.
    """
    size = 2 * call.block_size * call.value_width  # bytes of a head's values in a block
    for first in range(0, tokens, STEP):
        block, offset = table[first // call.block_size], first % call.block_size
        step = call.values + (block * call.value_heads + head) * size + 2 * offset * call.value_width
        room.steps[first // STEP] = step
        some = min(STEP, tokens - first)
        if some < STEP:
            room.steps[first // STEP] = address_of(room.last)
            fill(address_of(room.last), room.last.size, np.uint32(0))
            copy(step, address_of(room.last), some // 2 * call.value_width, np.uint32(0))
            if some % 2:
                half = carray(address(step + 2 * (some - 1) * call.value_width, np.uint32(0)), (call.value_width,))
                for i in range(call.value_width):
                    room.last[some // 2, i] = half[i] & np.uint32(0xFFFF)


@compiled
def _mix(call, head, steps, room, out):
    """out [heads, width], an address, are weights . values for the heads that share a value head."""
    group, width, line = call.heads // call.value_heads, call.value_width, room.weights.strides[0]
    to = out + 4 * head * group * width
    for s in range(steps):
        weights = address_of(room.weights) + head * group * line + 2 * STEP * s
        if group < singles.SIDE:
            for h in range(group):
                singles.mix(weights + h * line, room.steps[s], width // 32, s == 0, to + 4 * h * width)
        else:
            paired.mix(weights, line, room.steps[s], width, group, s == 0, to)


@compiled
def _attend(call, item, room, like, tiled):
    """One item: its maximum, sum and weighted values, not normalised, go to `stats` and `partial`.

    Returns its row, and the item that is taken next: what is read next is prefetched, since the processor's own
    guesses end at every page.
    """
    heads, block_size = call.heads, call.block_size
    row, length, position, first_block, tokens, blocks, table = decode.place_of(call, item)
    out = call.partial + 4 * item * heads * call.value_width
    stats = call.stats + 8 * item * heads
    in_tiles = tiled is not None and call.key_tiles
    queries = _prepare_queries(call, row, position, room, in_tiles)
    if first_block * block_size + tokens == length:  # the new token is one of these
        prompt.write_token(call, row, position, table[blocks - 1], (length - 1) % block_size, like)
    keys_size = 2 * call.key_heads * block_size * call.key_width
    values_size = 2 * call.value_heads * block_size * call.value_width
    for b in range(blocks):
        at, keys = b * block_size, call.keys + table[b] * keys_size
        soon = call.keys + table[min(b + 1, blocks - 1)] * keys_size
        values = call.values + table[b] * values_size
        if in_tiles:
            _score_in_tiles(call, keys, at, room, soon, values)
        else:
            _score(call, queries, keys, min(block_size, tokens - at), at, room, soon, values)
    steps = -(-tokens // STEP)
    for h in range(heads):
        scores = address_of(room.scores) + h * room.scores.strides[0]
        weights, peak = address_of(room.weights) + h * room.weights.strides[0], stats + 4 * h
        singles.soften(scores, tokens, np.float32(call.scale), weights, peak, peak + 4 * heads)
        fill(weights + 2 * tokens, steps * STEP - tokens, np.uint16(0))
    following = fetch_add(call.counters)
    soon = decode.first_keys(call, following, keys_size)
    for head in range(call.value_heads):
        _take_values(call, head, table, tokens, room)
        if tiled is not None and call.value_tiles:
            weights, total = address_of(room.weights), address_of(room.total)
            lines = _lines(2 * block_size * call.key_width, call.value_width // 32)
            tiles.mix(weights, room.weights.strides[0], room.steps, steps, call.value_width, total, soon, lines)
            copy(total, out, heads * call.value_width, ZERO)
        else:
            prefetch_rows(soon, head, 1, _lines(2 * block_size * call.key_width, call.value_heads))
            _mix(call, head, steps, room, out)
    return row, following


@compiled
def _merge(call, row, room, like):
    """The items of a row, all finished, become its output."""
    mean, out = room.total[0], carray(address(call.out, like), (call.rows, call.heads, call.value_width))
    for h in range(call.heads):
        decode.mean_of(call, row, h, mean)
        for i in range(call.value_width):
            out[row, h, i] = narrow(mean[i], like)


@part
def work(call, like, tiled):
    """Take items until none is left; the thread that ends a row's last item merges the row.

    What all heads share is met in tiles, if `tiled` is not None, by a thread whose tiles are configured.
    """
    first_items = carray(address(call.first_items, 0), (call.rows + 1,))
    room = _room(call)
    item = fetch_add(call.counters)
    while item < call.items:
        row, item = _attend(call, item, room, like, tiled)
        if fetch_add(call.counters + 8 * (1 + row)) + 1 == first_items[row + 1] - first_items[row]:
            _merge(call, row, room, like)
            fetch_add(call.counters + 8 * (1 + call.rows))
    _give_back(room)
