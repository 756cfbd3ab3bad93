"""Decode attention as machine code: single queries over a paged cache of keys and values, full or latent.

Plain loops that LLVM vectorises. The cache's numbers are widened to float32, in which everything is computed.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import carray, from_dtype, types

from lpa_model.kernels import paired, prompt, singles, tiles
from lpa_model.kernels.machine import (
    ZERO,
    address,
    compiled,
    copy,
    exp,
    fetch_add,
    fill,
    narrow,
    part,
    prefetch_rows,
    widen,
)
from lpa_model.kernels.records import CALL


@compiled
def _scores(q, keys, tokens, out, ahead):
    """q [width] . keys[:tokens] [.., width] -> out[:tokens]; `ahead` is the address of what is read next."""
    t = 0
    while t + 4 <= tokens:
        prefetch_rows(ahead, t, 4, keys.strides[0])
        k0, k1, k2, k3 = keys[t], keys[t + 1], keys[t + 2], keys[t + 3]
        s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
        for i in range(q.shape[0]):
            s0 += q[i] * widen(k0[i])
            s1 += q[i] * widen(k1[i])
            s2 += q[i] * widen(k2[i])
            s3 += q[i] * widen(k3[i])
        out[t], out[t + 1], out[t + 2], out[t + 3] = s0, s1, s2, s3
        t += 4
    while t < tokens:
        k0, s0 = keys[t], ZERO
        for i in range(q.shape[0]):
            s0 += q[i] * widen(k0[i])
        out[t] = s0
        t += 1


@compiled
def _scores_of_four(q, keys, tokens, out, at, ahead):
    """q [4, width] . keys[:tokens] [.., width] -> out[:, at : at + tokens]: every key is widened once for all four."""
    q0, q1, q2, q3 = q[0], q[1], q[2], q[3]
    t = 0
    while t + 2 <= tokens:
        prefetch_rows(ahead, t, 2, keys.strides[0])
        k0, k1 = keys[t], keys[t + 1]
        a0, a1, a2, a3 = ZERO, ZERO, ZERO, ZERO
        b0, b1, b2, b3 = ZERO, ZERO, ZERO, ZERO
        for i in range(q0.shape[0]):
            a, b = widen(k0[i]), widen(k1[i])
            a0 += q0[i] * a
            a1 += q1[i] * a
            a2 += q2[i] * a
            a3 += q3[i] * a
            b0 += q0[i] * b
            b1 += q1[i] * b
            b2 += q2[i] * b
            b3 += q3[i] * b
        out[0, at + t], out[1, at + t], out[2, at + t], out[3, at + t] = a0, a1, a2, a3
        out[0, at + t + 1], out[1, at + t + 1], out[2, at + t + 1], out[3, at + t + 1] = b0, b1, b2, b3
        t += 2
    if t < tokens:
        for h in range(4):
            _scores(q[h], keys[t:], tokens - t, out[h, at + t :], ahead)


@compiled
def _mix(weights, values, tokens, out, ahead):
    """out [width] += weights[:tokens] . values[:tokens] [.., width]."""
    t = 0
    while t + 4 <= tokens:
        prefetch_rows(ahead, t, 4, values.strides[0])
        v0, v1, v2, v3 = values[t], values[t + 1], values[t + 2], values[t + 3]
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        for i in range(out.shape[0]):
            out[i] += w0 * widen(v0[i]) + w1 * widen(v1[i]) + w2 * widen(v2[i]) + w3 * widen(v3[i])
        t += 4
    while t < tokens:
        v0, w0 = values[t], weights[t]
        for i in range(out.shape[0]):
            out[i] += w0 * widen(v0[i])
        t += 1


@compiled
def _mix_of_four(weights, at, values, tokens, out, ahead):
    """out [4, width] += weights[:, at : at + tokens] . values[:tokens] [.., width]: a value is widened once for all."""
    o0, o1, o2, o3 = out[0], out[1], out[2], out[3]
    t = 0
    while t + 4 <= tokens:
        prefetch_rows(ahead, t, 4, values.strides[0])
        v0, v1, v2, v3 = values[t], values[t + 1], values[t + 2], values[t + 3]
        w = weights[:, at + t :]
        a0, a1, a2, a3 = w[0, 0], w[0, 1], w[0, 2], w[0, 3]
        b0, b1, b2, b3 = w[1, 0], w[1, 1], w[1, 2], w[1, 3]
        c0, c1, c2, c3 = w[2, 0], w[2, 1], w[2, 2], w[2, 3]
        d0, d1, d2, d3 = w[3, 0], w[3, 1], w[3, 2], w[3, 3]
        for i in range(o0.shape[0]):
            x0, x1, x2, x3 = widen(v0[i]), widen(v1[i]), widen(v2[i]), widen(v3[i])
            o0[i] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
            o1[i] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
            o2[i] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
            o3[i] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3
        t += 4
    if t < tokens:
        for h in range(4):
            _mix(weights[h, at + t :], values[t:], tokens - t, out[h], ahead)


@compiled
def _soften(scores, tokens):
    """scores[:tokens] become e^(score - maximum); returns the maximum and the sum."""
    peak = scores[0]
    for t in range(1, tokens):
        peak = max(peak, scores[t])
    total = ZERO
    for t in range(tokens):
        weight = exp(scores[t] - peak)
        scores[t] = weight
        total += weight
    return peak, total


@compiled
def turn(x, turns, out, like):
    """Rotary position: neighbours x[2i], x[2i + 1] turn by turns [width] = (cos, sin, cos, sin, ...)."""
    for i in range(x.shape[0] // 2):
        a, b = widen(x[2 * i]), widen(x[2 * i + 1])
        cos, sin = turns[2 * i], turns[2 * i + 1]
        out[2 * i] = narrow(a * cos - b * sin, like)
        out[2 * i + 1] = narrow(b * cos + a * sin, like)


@compiled
def _prepare_queries(call, row, position, q, like):
    """The row's queries times the scale, turned where positions are rotary."""
    raw = carray(address(call.q, like), (call.rows, call.heads, call.key_width))[row]
    turns = carray(address(call.turns + 4 * position * call.key_width, ZERO), (call.key_width,))
    for h in range(call.heads):
        if call.turns:
            turn(raw[h], turns, q[h], ZERO)
        else:
            for i in range(call.key_width):
                q[h, i] = widen(raw[h, i])
        for i in range(call.key_width):
            q[h, i] *= np.float32(call.scale)


@compiled
def _pair_queries(call, row, pairs, like):
    """The row's queries as `tiles.scores` takes them."""
    raw = carray(address(call.q, like), (call.rows, call.heads, call.key_width))[row]
    for h in range(call.heads):
        for i in range(call.key_width):
            pairs[i // 2, h, i % 2] = raw[h, i]


@compiled
def write_new_token(call, row, position, keys, values, block, offset, like):
    turns = carray(address(call.turns + 4 * position * call.key_width, ZERO), (call.key_width,))
    new_keys = carray(address(call.new_keys, like), (call.rows, call.key_stride))[row]
    new_values = carray(address(call.new_values, like), (call.rows, call.value_stride))[row]
    for h in range(call.key_heads):
        new = new_keys[h * call.key_width : (h + 1) * call.key_width]
        if call.turns:
            turn(new, turns, keys[block, h, offset], like)
        else:
            copy(new.ctypes.data, keys[block, h, offset].ctypes.data, call.key_width, like)
    for h in range(call.value_heads):
        new = new_values[h * call.value_width : (h + 1) * call.value_width]
        copy(new.ctypes.data, values[block, h, offset].ctypes.data, call.value_width, like)


@compiled
def _scores_by_head(call, keys, q, tokens, scores, at, ahead):
    """q [heads, width] . keys[:, :tokens] [key_heads, .., width] -> scores[:, at : at + tokens]."""
    group = call.heads // call.key_heads
    for k in range(call.key_heads):
        h = k * group
        soon = ahead if k + 1 == call.key_heads else keys.ctypes.data + (k + 1) * keys.strides[0]
        while h + 4 <= (k + 1) * group:
            _scores_of_four(q[h : h + 4], keys[k], tokens, scores[h : h + 4], at, soon)
            h += 4
        while h < (k + 1) * group:
            _scores(q[h], keys[k], tokens, scores[h, at:], soon)
            h += 1


@compiled
def _scores_in_vectors(call, queries, keys, tokens, scores, at, ahead):
    """The same from bfloat16 queries [heads, width] at an address, 16 keys at a time: some behind the last one too."""
    group, size, parts = call.heads // call.key_heads, 2 * call.key_width, call.key_width // 32
    side, line, scale = singles.SIDE, scores.strides[0], np.float32(call.scale)
    for k in range(call.key_heads):
        rows, end = keys.ctypes.data + k * call.block_size * size, (k + 1) * group
        soon = ahead if k + 1 == call.key_heads else rows + call.block_size * size
        for t in range(0, tokens, 16):
            some, found = rows + t * size, scores.ctypes.data + 4 * (at + t)
            if group < side:
                prefetch_rows(soon, t, 16, size)
                for h in range(k * group, end):
                    singles.score(queries + h * size, some, size, parts, scale, found + h * line)
            else:
                for j in range(0, 16, side):
                    for own in range(0, group, side):
                        h, row = k * group + min(own, group - side), t + j + own // 2
                        first, to = queries + h * size, found + h * line + 4 * j
                        soon_rows = soon + row * size if own < 2 * side else first
                        singles.score_square(first, some + j * size, size, parts, scale, to, line, soon_rows)


@compiled
def _mix_by_head(call, weights, at, values, tokens, out, ahead):
    """out [heads, width] += weights[:, at : at + tokens] . values[:, :tokens] [value_heads, .., width]."""
    group = call.heads // call.value_heads
    for k in range(call.value_heads):
        h = k * group
        soon = ahead if k + 1 == call.value_heads else values.ctypes.data + (k + 1) * values.strides[0]
        while h + 4 <= (k + 1) * group:
            _mix_of_four(weights[h : h + 4], at, values[k], tokens, out[h : h + 4], soon)
            h += 4
        while h < (k + 1) * group:
            _mix(weights[h, at:], values[k], tokens, out[h], soon)
            h += 1


@compiled
def _first_keys(call, item, keys):
    """The address of the keys that an item begins with; of the last one's where there is no such item."""
    item = min(item, call.items - 1)
    row = carray(address(call.item_rows, 0), (call.items,))[item]
    first = carray(address(call.first_items, 0), (call.rows + 1,))[row]
    start = carray(address(call.table_starts, 0), (call.rows,))[row] + (item - first) * call.tile_blocks
    return call.keys + carray(address(call.tables + 8 * start, 0), (1,))[0] * keys.strides[0]


@compiled
def _attend(call, item, q, scores, room, like, tiled):
    """One item: its maximum, sum and weighted values, not normalised, go to `stats` and `partial`.

    Returns its row, and the item that is taken next: what is read next is asked for a block or a head ahead, since the
    processor's own guesses end at every page.
    """
    heads, block_size = call.heads, call.block_size
    row = carray(address(call.item_rows, 0), (call.items,))[item]
    first = carray(address(call.first_items, 0), (call.rows + 1,))[row]
    length = carray(address(call.lengths, 0), (call.rows,))[row]
    position = carray(address(call.positions, 0), (call.rows,))[row]
    start = carray(address(call.table_starts, 0), (call.rows,))[row]
    first_block = (item - first) * call.tile_blocks
    table = carray(address(call.tables + 8 * (start + first_block), 0), (call.tile_blocks,))
    tokens = min(call.tile_blocks * block_size, length - first_block * block_size)
    blocks = -(-tokens // block_size)
    keys = carray(address(call.keys, like), (1 << 30, call.key_heads, block_size, call.key_width))
    values = carray(address(call.values, like), (1 << 30, call.value_heads, block_size, call.value_width))
    out = carray(address(call.partial, ZERO), (call.items, heads, call.value_width))[item]
    stats = carray(address(call.stats, ZERO), (call.items, 2, heads))[item]

    vectors = room is not None and call.key_width % 32 == 0 and block_size % 16 == 0
    if tiled is not None and call.key_tiles:
        _pair_queries(call, row, room.queries, like)
    elif room is not None and vectors:
        queries = call.q + 2 * row * heads * call.key_width
        if call.turns:
            prompt.turn_heads(call, position, queries, heads, room.turned.ctypes.data)
            queries = room.turned.ctypes.data
    else:
        _prepare_queries(call, row, position, q, like)
    if first_block * block_size + tokens == length:  # the new token is one of these
        block, offset = table[blocks - 1], (length - 1) % block_size
        if room is not None and vectors:
            prompt.write_token(call, row, position, block, offset, like)
        else:
            write_new_token(call, row, position, keys, values, block, offset, like)

    for b in range(blocks):
        at = b * block_size
        count = min(block_size, tokens - at)
        soon = call.values + table[0] * values.strides[0]
        if b + 1 < blocks:
            soon = call.keys + table[b + 1] * keys.strides[0]
        if tiled is not None and call.key_tiles:
            scale = np.float32(call.scale)
            tiles.scores(keys[table[b], 0], room.queries, scale, scores, at, room.found, soon)
        elif room is not None and vectors:
            _scores_in_vectors(call, queries, keys[table[b]], count, scores, at, soon)
        else:
            _scores_by_head(call, keys[table[b]], q, count, scores, at, soon)
    for h in range(heads):
        if room is not None and vectors:
            weights = room.weights[h]
            peak = stats.ctypes.data + 4 * h
            singles.soften(scores[h].ctypes.data, tokens, weights.ctypes.data, peak, peak + 4 * heads)
            fill(weights.ctypes.data + 2 * tokens, len(weights) - tokens, np.uint16(0))
        else:
            stats[0, h], stats[1, h] = _soften(scores[h], tokens)
    fill(out.ctypes.data, out.size, ZERO)
    if room is not None and call.value_tiles and not vectors:
        for h in range(heads):
            for t in range(tokens):
                room.weights[h, t] = narrow(scores[h, t], like)
            fill(room.weights[h, tokens:].ctypes.data, room.weights.shape[1] - tokens, np.uint16(0))
    if tiled is not None and call.value_tiles:
        fill(room.total.ctypes.data, room.total.size, ZERO)
    following = fetch_add(call.counters)
    for b in range(blocks):
        at = b * block_size
        count = min(block_size, tokens - at)
        soon = _first_keys(call, following, keys)
        if b + 1 < blocks:
            soon = call.values + table[b + 1] * values.strides[0]
        if room is None or not call.value_tiles:
            _mix_by_head(call, scores, at, values[table[b]], count, out, soon)
        elif tiled is None:
            paired.mix(room.weights, at, values[table[b], 0], count, room.values.ctypes.data, out, soon)
        else:
            tiles.mix(room.weights, at, values[table[b], 0], count, room.values, room.total, soon)
    if tiled is not None and call.value_tiles:
        copy(room.total.ctypes.data, out.ctypes.data, out.size, ZERO)
    return row, following


@compiled
def _merge(call, row, room, like):
    """The items of a row, all finished, become its output, in the order of their tokens."""
    heads, width = call.heads, call.value_width
    first_items = carray(address(call.first_items, 0), (call.rows + 1,))
    first, end = first_items[row], first_items[row + 1]
    partial = carray(address(call.partial, ZERO), (call.items, heads, width))
    stats = carray(address(call.stats, ZERO), (call.items, 2, heads))
    up = carray(address(call.up, like), (call.up_heads, call.up_width, width))
    up_bias = carray(address(call.up_bias, like), (call.up_heads, call.up_width))
    mean, rebuilt = np.empty(width, np.float32), np.empty(call.up_width, np.float32)
    for h in range(heads):
        peak = stats[first, 0, h]
        for item in range(first + 1, end):
            peak = max(peak, stats[item, 0, h])
        total = ZERO
        for item in range(first, end):
            share = exp(stats[item, 0, h] - peak)
            stats[item, 0, h] = share
            total += share * stats[item, 1, h]
        fill(mean.ctypes.data, width, ZERO)
        for item in range(first, end):
            share = stats[item, 0, h] / total
            for i in range(width):
                mean[i] += share * partial[item, h, i]
        if call.up:
            out = carray(address(call.out, like), (call.rows, heads, call.up_width))[row, h]
            g = h // (heads // call.up_heads)
            if room is not None and width % 32 == 0 and call.up_width % 16 == 0:
                for i in range(width):
                    room.mean[i] = narrow(mean[i], like)
                for i in range(0, call.up_width, 16):
                    rows = up[g].ctypes.data + 2 * i * width
                    found = rebuilt.ctypes.data + 4 * i
                    singles.score(room.mean.ctypes.data, rows, 2 * width, width // 32, np.float32(1), found)
            else:
                _scores(mean, up[g], call.up_width, rebuilt, call.up + (g + 1) * up.strides[0])
            for i in range(call.up_width):
                bias = widen(up_bias[g, i]) if call.up_bias else ZERO
                out[i] = narrow(rebuilt[i] + bias, like)
        else:
            out = carray(address(call.out, like), (call.rows, heads, width))[row, h]
            for i in range(width):
                out[i] = narrow(mean[i], like)


@part
def _work(call, room, like, tiled):
    """Take items until none is left; the thread that ends a row's last item merges the row."""
    first_items = carray(address(call.first_items, 0), (call.rows + 1,))
    q = np.empty((call.heads, call.key_width), np.float32)
    scores = np.empty((call.heads, call.tile_blocks * call.block_size), np.float32)
    item = fetch_add(call.counters)
    while item < call.items:
        row, item = _attend(call, item, q, scores, room, like, tiled)
        if fetch_add(call.counters + 8 * (1 + row)) + 1 == first_items[row + 1] - first_items[row]:
            _merge(call, row, room, like)
            fetch_add(call.counters + 8 * (1 + call.rows))


Room = namedtuple("Room", ["queries", "turned", "found", "weights", "values", "total", "mean"])
"""What one thread's products of tiles, or of vectors in their place, need beside the cache: see `tiles`."""


@compiled
def work_in_vectors(call, like, tiled):
    """All of the work; products of what all heads share in tiles if `tiled`, by a thread whose tiles are configured."""
    heads = max(call.heads, tiles.HEADS)
    room = Room(
        np.zeros((call.key_width // 2, heads, 2), np.uint16),
        np.empty((heads, call.key_width), np.uint16),
        np.empty((tiles.TOKENS, tiles.HEADS), np.float32),
        np.zeros((heads, call.tile_blocks * call.block_size), np.uint16),
        np.empty((tiles.TOKENS // 2, call.value_width), np.uint32),
        np.empty((heads, call.value_width), np.float32),
        np.empty(call.value_width, np.uint16),
    )
    _work(call, room, like, tiled)


SIGNATURE = types.void(types.CPointer(from_dtype(CALL)))


def decode_bfloat16(call):
    _work(carray(call, (1,))[0], None, np.uint16(0), None)


def decode_bfloat16_in_vectors(call):
    work_in_vectors(carray(call, (1,))[0], np.uint16(0), None)


def decode_bfloat16_in_tiles(call):
    tiles.configure()
    work_in_vectors(carray(call, (1,))[0], np.uint16(0), True)
    tiles.release()


def decode_float32(call):
    _work(carray(call, (1,))[0], None, ZERO, None)
