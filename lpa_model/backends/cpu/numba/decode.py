"""Where a work item of decode attention stands, and how the items of a row are merged."""

from __future__ import annotations

from numba import carray

from lpa_model.backends.cpu.numba.machine import ZERO, address, address_of, compiled, exp, fill


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
