"""Decode attention as machine code: single queries over a paged cache of keys and values, full or latent.

Plain loops that LLVM vectorises. The cache's numbers are widened to float32, in which everything is computed.
"""

from __future__ import annotations

import numpy as np
from numba import carray, from_dtype, types

from lpa_model.backends.cpu.kernels.machine import (
    ZERO,
    address,
    address_of,
    compiled,
    copy,
    exp,
    fetch_add,
    fill,
    give_back,
    narrow,
    prefetch_rows,
    take,
    widen,
)
from lpa_model.backends.cpu.kernels.records import CALL


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
def _write_new_token(call, row, position, keys, values, block, offset, like):
    turns = carray(address(call.turns + 4 * position * call.key_width, ZERO), (call.key_width,))
    new_keys = carray(address(call.new_keys, like), (call.rows, call.key_stride))[row]
    new_values = carray(address(call.new_values, like), (call.rows, call.value_stride))[row]
    for h in range(call.key_heads):
        new = new_keys[h * call.key_width : (h + 1) * call.key_width]
        if call.turns:
            turn(new, turns, keys[block, h, offset], like)
        else:
            copy(address_of(new), address_of(keys[block, h, offset]), call.key_width, like)
    for h in range(call.value_heads):
        new = new_values[h * call.value_width : (h + 1) * call.value_width]
        copy(address_of(new), address_of(values[block, h, offset]), call.value_width, like)


@compiled
def _scores_by_head(call, keys, q, tokens, scores, at, ahead):
    """q [heads, width] . keys[:, :tokens] [key_heads, .., width] -> scores[:, at : at + tokens]."""
    group = call.heads // call.key_heads
    for k in range(call.key_heads):
        h = k * group
        soon = ahead if k + 1 == call.key_heads else address_of(keys) + (k + 1) * keys.strides[0]
        while h + 4 <= (k + 1) * group:
            _scores_of_four(q[h : h + 4], keys[k], tokens, scores[h : h + 4], at, soon)
            h += 4
        while h < (k + 1) * group:
            _scores(q[h], keys[k], tokens, scores[h, at:], soon)
            h += 1


@compiled
def _mix_by_head(call, weights, at, values, tokens, out, ahead):
    """out [heads, width] += weights[:, at : at + tokens] . values[:, :tokens] [value_heads, .., width]."""
    group = call.heads // call.value_heads
    for k in range(call.value_heads):
        h = k * group
        soon = ahead if k + 1 == call.value_heads else address_of(values) + (k + 1) * values.strides[0]
        while h + 4 <= (k + 1) * group:
            _mix_of_four(weights[h : h + 4], at, values[k], tokens, out[h : h + 4], soon)
            h += 4
        while h < (k + 1) * group:
            _mix(weights[h, at:], values[k], tokens, out[h], soon)
            h += 1


@compiled
def first_keys(call, item, size):
    """The address of the keys that an item begins with, or the last item if there is no such one; `size`: bytes of keys
    in a block."""
    item = min(item, call.items - 1)
    row = carray(address(call.item_rows, 0), (call.items,))[item]
    first = carray(address(call.first_items, 0), (call.rows + 1,))[row]
    start = carray(address(call.table_starts, 0), (call.rows,))[row] + (item - first) * call.tile_blocks
    return call.keys + carray(address(call.tables + 8 * start, 0), (1,))[0] * size


@compiled
def place_of(call, item):
    """An item's row, that row's length and position, and of the item the first block in the row, how many tokens and
    blocks there are, and which blocks."""
    row = carray(address(call.item_rows, 0), (call.items,))[item]
    first = carray(address(call.first_items, 0), (call.rows + 1,))[row]
    length = carray(address(call.lengths, 0), (call.rows,))[row]
    position = carray(address(call.positions, 0), (call.rows,))[row]
    start = carray(address(call.table_starts, 0), (call.rows,))[row]
    first_block = (item - first) * call.tile_blocks
    table = carray(address(call.tables + 8 * (start + first_block), 0), (call.tile_blocks,))
    tokens = min(call.tile_blocks * call.block_size, length - first_block * call.block_size)
    return row, length, position, first_block, tokens, -(-tokens // call.block_size), table


@compiled
def _attend(call, item, q, scores, like):
    """One item: its maximum, sum and weighted values, not normalised, go to `stats` and `partial`.

    Returns its row, and the item that is taken next: what is read next is asked for a block or a head ahead, since the
    processor's own guesses end at every page.
    """
    heads, block_size = call.heads, call.block_size
    row, length, position, first_block, tokens, blocks, table = place_of(call, item)
    keys = carray(address(call.keys, like), (1 << 30, call.key_heads, block_size, call.key_width))
    values = carray(address(call.values, like), (1 << 30, call.value_heads, block_size, call.value_width))
    out = carray(address(call.partial, ZERO), (call.items, heads, call.value_width))[item]
    stats = carray(address(call.stats, ZERO), (call.items, 2, heads))[item]
    _prepare_queries(call, row, position, q, like)
    if first_block * block_size + tokens == length:  # the new token is one of these
        _write_new_token(call, row, position, keys, values, table[blocks - 1], (length - 1) % block_size, like)
    for b in range(blocks):
        at = b * block_size
        soon = call.values + table[0] * values.strides[0]
        if b + 1 < blocks:
            soon = call.keys + table[b + 1] * keys.strides[0]
        _scores_by_head(call, keys[table[b]], q, min(block_size, tokens - at), scores, at, soon)
    for h in range(heads):
        stats[0, h], stats[1, h] = _soften(scores[h], tokens)
    fill(address_of(out), out.size, ZERO)
    following = fetch_add(call.counters)
    for b in range(blocks):
        at = b * block_size
        soon = first_keys(call, following, keys.strides[0])
        if b + 1 < blocks:
            soon = call.values + table[b + 1] * values.strides[0]
        _mix_by_head(call, scores, at, values[table[b]], min(block_size, tokens - at), out, soon)
    return row, following


@compiled
def mean_of(call, row, head, mean):
    """mean float32 [value_width] of a head's values, from the items of a row, in the order of their tokens."""
    first_items = carray(address(call.first_items, 0), (call.rows + 1,))
    first, end = first_items[row], first_items[row + 1]
    partial = carray(address(call.partial, ZERO), (call.items, call.heads, call.value_width))
    stats = carray(address(call.stats, ZERO), (call.items, 2, call.heads))
    peak = stats[first, 0, head]
    for item in range(first + 1, end):
        peak = max(peak, stats[item, 0, head])
    total = ZERO
    for item in range(first, end):
        share = exp(stats[item, 0, head] - peak)
        stats[item, 0, head] = share
        total += share * stats[item, 1, head]
    fill(address_of(mean), mean.size, ZERO)
    for item in range(first, end):
        share = stats[item, 0, head] / total
        for i in range(call.value_width):
            mean[i] += share * partial[item, head, i]


@compiled
def _merge(call, row, like):
    """The items of a row, all finished, become its output."""
    heads, width = call.heads, call.value_width
    up = carray(address(call.up, like), (call.up_heads, call.up_width, width))
    up_bias = carray(address(call.up_bias, like), (call.up_heads, call.up_width))
    mean, rebuilt = take((width,), ZERO), take((call.up_width,), ZERO)
    for h in range(heads):
        mean_of(call, row, h, mean)
        if call.up:
            out = carray(address(call.out, like), (call.rows, heads, call.up_width))[row, h]
            g = h // (heads // call.up_heads)
            _scores(mean, up[g], call.up_width, rebuilt, call.up + (g + 1) * up.strides[0])
            for i in range(call.up_width):
                bias = widen(up_bias[g, i]) if call.up_bias else ZERO
                out[i] = narrow(rebuilt[i] + bias, like)
        else:
            out = carray(address(call.out, like), (call.rows, heads, width))[row, h]
            for i in range(width):
                out[i] = narrow(mean[i], like)
    give_back(mean)
    give_back(rebuilt)


@compiled
def _work(call, like):
    """Take items until none is left; the thread that ends a row's last item merges the row."""
    first_items = carray(address(call.first_items, 0), (call.rows + 1,))
    q = take((call.heads, call.key_width), ZERO)
    scores = take((call.heads, call.tile_blocks * call.block_size), ZERO)
    item = fetch_add(call.counters)
    while item < call.items:
        row, item = _attend(call, item, q, scores, like)
        if fetch_add(call.counters + 8 * (1 + row)) + 1 == first_items[row + 1] - first_items[row]:
            _merge(call, row, like)
            fetch_add(call.counters + 8 * (1 + call.rows))
    give_back(q)
    give_back(scores)


SIGNATURE = types.void(types.CPointer(from_dtype(CALL)))


def decode_bfloat16(call):
    _work(carray(call, (1,))[0], np.uint16(0))


def decode_float32(call):
    _work(carray(call, (1,))[0], ZERO)
