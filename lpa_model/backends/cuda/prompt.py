"""Attention of prompt rows over the paged cache: any mixture of chunks, of prefixes found and of branches.

A program is up to PROMPT_TILE rows of one span and one query head. Keys are read in tiles from the sequence's first
token on, so that what a row sums, and in which order, depends neither on its chunk nor on the other rows; a tile that
a row does not see changes no bit of it.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from lpa_model.backends.cuda.rows import PROMPT_TILE, Prompts


def prompt_attention(
    q: Tensor,
    keys: Tensor,
    key_tables: Tensor,
    values: Tensor,
    value_tables: Tensor,
    prompts: Prompts,
    scale: float,
    out: Tensor,
) -> None:
    """See `twins.prompt_attention`."""
    heads, width = q.shape[1:]
    block = max(16, triton.next_power_of_2(width))
    # tiles of queries, keys and values: at most 160 KB of shared memory, with two stages in bfloat16
    half_precision = q.element_size() == 2
    _attend_prompt[(len(prompts.tiles), heads)](
        q,
        keys,
        values,
        key_tables,
        value_tables,
        prompts.spans,
        prompts.tiles,
        prompts.hidden,
        out,
        scale * math.log2(math.e),
        width,
        *q.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        key_tables.stride(0),
        value_tables.stride(0),
        *out.stride()[:2],
        GROUP=heads // keys.shape[1],
        ROWS=PROMPT_TILE,
        TILE=64 if half_precision else 32,
        BLOCK=block,
        BLOCK_SIZE=keys.shape[2],
        num_warps=8 if block == 256 else 4,
        num_stages=2 if half_precision else 1,
    )


@triton.jit(do_not_specialize=["key_table_row", "value_table_row"])
def _attend_prompt(
    q,
    keys,
    values,
    key_tables,
    value_tables,
    spans,
    tiles,
    hidden,
    out,
    scale,
    width,
    q_row,
    q_head,
    key_block,
    key_head,
    key_token,
    value_block,
    value_head,
    value_token,
    key_table_row,
    value_table_row,
    out_row,
    out_head,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    span = tl.load(tiles + 2 * tile).to(tl.int64)
    first = tl.load(tiles + 2 * tile + 1)  # of this tile's rows, within the span
    context = tl.load(spans + 3 * span + 1)
    length = tl.load(spans + 3 * span + 2)
    offset = first + tl.arange(0, ROWS)
    mine = offset < length
    row = (tl.load(spans + 3 * span) + offset).to(tl.int64)
    index = context + offset  # of each row in its sequence
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    cell = mine[:, None] & inside[None, :]
    query = tl.load(q + row[:, None] * q_row + head * q_head + cols[None, :], mask=cell, other=0.0)
    gap_start = tl.load(hidden + 2 * row, mask=mine, other=0)
    gap_stop = tl.load(hidden + 2 * row + 1, mask=mine, other=0)
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    found = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    end = context + tl.minimum(first + ROWS, length)
    for start in range(0, end, TILE):
        t = start + tl.arange(0, TILE)
        there = t < end
        token = t % BLOCK_SIZE
        block = tl.load(key_tables + span * key_table_row + t // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        key_rows = keys + block * key_block + (head // GROUP) * key_head + token * key_token
        key = tl.load(key_rows[None, :] + cols[:, None], mask=there[None, :] & inside[:, None], other=0.0)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        seen = t[None, :] <= index[:, None]
        seen &= (t[None, :] < gap_start[:, None]) | (t[None, :] >= gap_stop[:, None])
        seen &= there[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        # a row may have seen nothing yet: a branch's beginning lies behind the gap
        floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - floor[:, None])
        shrink = tl.exp2(peak - floor)
        total = total * shrink + tl.sum(weights, axis=1)
        block = tl.load(value_tables + span * value_table_row + t // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        value_rows = values + block * value_block + (head // GROUP) * value_head + token * value_token
        value = tl.load(value_rows[:, None] + cols[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        found = tl.dot(weights.to(value.dtype), value, found * shrink[:, None], input_precision="ieee")
        peak = new_peak
    found = found / tl.where(total == 0.0, 1.0, total)[:, None]  # rows behind the span's last
    tl.store(out + row[:, None] * out_row + head * out_head + cols[None, :], found.to(out.dtype.element_ty), mask=cell)
