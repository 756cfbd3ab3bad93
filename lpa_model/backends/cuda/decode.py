"""Attention of generated tokens over the paged cache: split-KV in two kernels, batch-invariant.

A sequence is cut into splits of SPLIT tokens, counted from its first: how many there are, and what each of them sums,
follows from its length alone. `_attend` computes one split for some heads of one row; `_merge` adds a row's splits up
in their order. The grid covers the longest sequence that the table could hold, so that it is the same in every replay
of a graph; programs of splits behind a row's length return at once.

Heads of one program are the rows of its `tl.dot`, at least 16. Where values are latents, all heads share them, and one
program reads them once for up to 32 heads. If each of these has a key of its own, the program adds up one product per
key head, in which the rows of the other heads are zeros: so scores of all heads meet in one tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpa_model.backends.cuda.rows import Decodes
from lpa_model.backends.cuda.weights import KeyUp

# Long sequences of few rows need many programs (132 processors; 8192 tokens are 64 splits), and each split costs one
# float32 row per head, written and read again: 6 % of what 128 tokens of 640 bfloat16 take.
SPLIT = 128
MERGED = 8  # splits that `_merge` reads at once
MOST_HEADS = 32  # of a program that reads shared latents
SHARED_MEMORY = 100 * 1024  # bytes that a program's tiles of keys and values may take: two programs per processor


class HeadSplit(NamedTuple):
    """How heads are shared out to programs."""

    programs: int
    heads: int  # query heads of a program
    key_heads: int  # key heads of a program


def head_split(heads: int, key_heads: int, values_shared: bool, keys_shared: bool) -> HeadSplit:
    """
    Args:
        heads: query heads.
        key_heads: as the model has them.
        values_shared: values are latents.
        keys_shared: keys are latents that were absorbed into the queries.
    """
    group = heads // key_heads
    if not values_shared:
        return HeadSplit(key_heads, group, 1)
    if keys_shared:
        return HeadSplit(triton.cdiv(heads, MOST_HEADS), min(heads, MOST_HEADS), 1)
    together = min(key_heads, max(1, MOST_HEADS // group))
    return HeadSplit(triton.cdiv(key_heads, together), together * group, together)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, decodes: Decodes, scale: float, rebuilt: KeyUp | None, out: Tensor
) -> None:
    """See `twins.decode_attention`."""
    rows, heads, query_width = q.shape
    value_heads, block_size, value_width = values.shape[1:]
    keys_shared = keys.shape[1] == 1 and rebuilt is None
    key_heads = keys.shape[1] if rebuilt is None else len(rebuilt.weight)
    values_shared = value_heads == 1
    split = head_split(heads, max(key_heads, value_heads), values_shared, keys_shared)
    most = triton.cdiv(decodes.tables.shape[1] * block_size, SPLIT)
    partial = torch.empty((rows, most, heads, value_width), dtype=torch.float32, device=q.device)
    peaks = torch.empty((2, rows, most, heads), dtype=torch.float32, device=q.device)  # and sums
    key_width = keys.shape[3]
    up = q if rebuilt is None else rebuilt.weight
    bias = q if rebuilt is None or rebuilt.bias is None else rebuilt.bias
    cos, sin = (q, q) if rebuilt is None else rebuilt.rotary
    half = 0 if rebuilt is None else cos.shape[1]
    half_block = max(16, triton.next_power_of_2(max(half, 1)))
    key_block, value_block = triton.next_power_of_2(key_width), triton.next_power_of_2(value_width)
    block_heads = max(16, triton.next_power_of_2(split.heads))
    _attend[(rows, split.programs, most)](
        q,
        keys,
        values,
        decodes.tables,
        decodes.lengths,
        up,
        bias,
        cos,
        sin,
        partial,
        peaks,
        peaks[1],
        scale * math.log2(math.e),
        heads,
        key_width,
        value_width,
        most,
        *q.stride()[:2],
        *_head_strides(keys, rebuilt is not None),
        *_head_strides(values, values_shared),
        decodes.tables.stride(0),
        HEADS=split.heads,
        KEY_HEADS=split.key_heads,
        GROUP=split.heads // split.key_heads,
        BLOCK_HEADS=block_heads,
        KEY_BLOCK=key_block,
        VALUE_BLOCK=value_block,
        TILE=_tile(key_block, value_block, keys.element_size()),
        SPLIT=SPLIT,
        BLOCK_SIZE=block_size,
        REBUILT=rebuilt is not None,
        HAS_BIAS=rebuilt is not None and rebuilt.bias is not None,
        HALF=half,
        HALF_BLOCK=half_block,
        # both halves of B_k, twice for two stages: 32 KB
        RANK_BLOCK=min(key_block, 8192 // (half_block * q.element_size())),
        UP_WIDTH=query_width,
        num_warps=8 if block_heads * value_block > 16 * 512 else 4,
        num_stages=_stages(keys),
    )
    _merge[(rows, heads)](
        partial,
        peaks,
        peaks[1],
        decodes.lengths,
        out,
        heads,
        value_width,
        most,
        *out.stride()[:2],
        SPLIT=SPLIT,
        MERGED=MERGED,
        VALUE_BLOCK=value_block,
        num_warps=4,
    )


def _head_strides(pool: Tensor, shared: bool) -> tuple[int, int, int]:
    """Of blocks, heads and tokens; 0 where all heads read the same one."""
    block, head, token = pool.stride()[:3]
    return block, 0 if shared or pool.shape[1] == 1 else head, token


def _stages(pool: Tensor) -> int:
    return 2 if pool.element_size() == 2 else 1


def _tile(key_block: int, value_block: int, itemsize: int) -> int:
    """Tokens of a tile: 64, or fewer where their keys and values take more shared memory than a program may have."""
    stages = 2 if itemsize == 2 else 1
    tokens = 64
    while tokens > 16 and tokens * (key_block + value_block) * itemsize * stages > SHARED_MEMORY:
        tokens //= 2
    return tokens


@triton.jit
def _rebuilt_scores(
    scores,
    q,
    latent_rows,  # [TILE] pointers
    seen,
    up,
    bias,
    cos_tile,
    sin_tile,
    head_rows,
    inside,
    q_row_start,
    q_head,
    key_width,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    UP_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    key_head,
):
    """scores [BLOCK_HEADS, TILE] += q [BLOCK_HEADS, dh] x rotated (latents [TILE, r] x B_k [r, dh]).

    A pair that is rotated is (i, i + dh/2): both halves are products of their own, RANK_BLOCK of the latent at a time.
    """
    i = tl.arange(0, HALF_BLOCK)
    up_rows = up + key_head.to(tl.int64) * UP_WIDTH * key_width + i[None, :] * key_width
    first = tl.zeros((TILE, HALF_BLOCK), dtype=tl.float32)
    second = tl.zeros((TILE, HALF_BLOCK), dtype=tl.float32)
    for start in range(0, key_width, RANK_BLOCK):
        r = start + tl.arange(0, RANK_BLOCK)
        latent_mask = seen[:, None] & (r < key_width)[None, :]
        latents = tl.load(latent_rows[:, None] + r[None, :], mask=latent_mask, other=0.0)
        within = (r < key_width)[:, None] & (i < HALF)[None, :]
        some = tl.load(up_rows + r[:, None], mask=within, other=0.0)
        first = tl.dot(latents, some, first, input_precision="ieee")
        some = tl.load(up_rows + HALF * key_width + r[:, None], mask=within, other=0.0)
        second = tl.dot(latents, some, second, input_precision="ieee")
    if HAS_BIAS:
        first += tl.load(bias + key_head * UP_WIDTH + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        second += tl.load(bias + key_head * UP_WIDTH + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    dtype = q.dtype.element_ty
    first = first.to(dtype).to(tl.float32)  # a key has the cache's dtype before it is rotated, and after
    second = second.to(dtype).to(tl.float32)
    rotated_first = (first * cos_tile - second * sin_tile).to(dtype)
    rotated_second = (second * cos_tile + first * sin_tile).to(dtype)
    q_at = q + q_row_start + head_rows[:, None] * q_head + i[None, :]
    mine = inside[:, None] & (i < HALF)[None, :]
    scores = tl.dot(tl.load(q_at, mask=mine, other=0.0), tl.trans(rotated_first), scores, input_precision="ieee")
    q_second = tl.load(q_at + HALF, mask=mine, other=0.0)
    return tl.dot(q_second, tl.trans(rotated_second), scores, input_precision="ieee")


@triton.jit(do_not_specialize=["heads", "most", "table_row"])  # one variant for every bucket
def _attend(
    q,
    keys,
    values,
    tables,
    lengths,
    up,
    bias,
    cos,
    sin,
    partial,
    peaks,
    sums,
    scale,
    heads,
    key_width,
    value_width,
    most,
    q_row,
    q_head,
    key_block,
    key_head,
    key_token,
    value_block,
    value_head,
    value_token,
    table_row,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    REBUILT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    UP_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    start = split * SPLIT
    if start >= length:
        return
    h = tl.arange(0, BLOCK_HEADS)
    head = program * HEADS + h
    mine = (h < HEADS) & (head < heads)
    first_key = program * KEY_HEADS
    last_key = tl.minimum(KEY_HEADS, heads // GROUP - first_key)
    key_cols = tl.arange(0, KEY_BLOCK)
    value_cols = tl.arange(0, VALUE_BLOCK)
    q_start = row * q_row
    if not REBUILT:
        q_mask = mine[:, None] & (key_cols < key_width)[None, :]
        query = tl.load(q + q_start + head[:, None] * q_head + key_cols[None, :], mask=q_mask, other=0.0)
    peak = tl.full((BLOCK_HEADS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_HEADS,), dtype=tl.float32)
    found = tl.zeros((BLOCK_HEADS, VALUE_BLOCK), dtype=tl.float32)
    for at in range(start, tl.minimum(start + SPLIT, length), TILE):
        t = at + tl.arange(0, TILE)
        seen = t < length
        block = tl.load(tables + row * table_row + t // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        token = t % BLOCK_SIZE
        key_rows = keys + block * key_block + token * key_token
        scores = tl.zeros((BLOCK_HEADS, TILE), dtype=tl.float32)
        if REBUILT:
            i = tl.arange(0, HALF_BLOCK)
            angle = t[:, None] * HALF + i[None, :]
            angle_mask = seen[:, None] & (i < HALF)[None, :]
            cos_tile = tl.load(cos + angle, mask=angle_mask, other=0.0)
            sin_tile = tl.load(sin + angle, mask=angle_mask, other=0.0)
            for g in range(0, last_key):
                scores = _rebuilt_scores(
                    scores,
                    q,
                    key_rows,
                    seen,
                    up,
                    bias,
                    cos_tile,
                    sin_tile,
                    head,
                    mine & (h // GROUP == g),
                    q_start,
                    q_head,
                    key_width,
                    HALF,
                    HALF_BLOCK,
                    RANK_BLOCK,
                    TILE,
                    UP_WIDTH,
                    HAS_BIAS,
                    first_key + g,
                )
        else:
            key_mask = seen[None, :] & (key_cols < key_width)[:, None]
            if KEY_HEADS == 1:
                key = tl.load(key_rows[None, :] + first_key * key_head + key_cols[:, None], mask=key_mask, other=0.0)
                scores = tl.dot(query, key, scores, input_precision="ieee")
            else:
                for g in range(0, last_key):
                    key = tl.load(
                        key_rows[None, :] + (first_key + g) * key_head + key_cols[:, None], mask=key_mask, other=0.0
                    )
                    alone = tl.where((h // GROUP == g)[:, None], query, 0.0).to(query.dtype)
                    scores = tl.dot(alone, key, scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))  # the first token of a tile is seen
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=1)
        value_rows = values + block * value_block + program * value_head + token * value_token
        value_mask = seen[:, None] & (value_cols < value_width)[None, :]
        value = tl.load(value_rows[:, None] + value_cols[None, :], mask=value_mask, other=0.0)
        found = tl.dot(weights.to(value.dtype), value, found * shrink[:, None], input_precision="ieee")
        peak = new_peak
    to = (row * most + split) * heads + head
    tl.store(peaks + to, peak, mask=mine)
    tl.store(sums + to, total, mask=mine)
    cell = partial + to[:, None] * value_width + value_cols[None, :]
    tl.store(cell, found, mask=mine[:, None] & (value_cols < value_width)[None, :])


@triton.jit(do_not_specialize=["heads", "most"])
def _merge(
    partial,
    peaks,
    sums,
    lengths,
    out,
    heads,
    value_width,
    most,
    out_row,
    out_head,
    SPLIT: tl.constexpr,
    MERGED: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    splits = (tl.load(lengths + row) + SPLIT - 1) // SPLIT
    cols = tl.arange(0, VALUE_BLOCK)
    peak = float("-inf")
    total = 0.0
    found = tl.zeros((VALUE_BLOCK,), dtype=tl.float32)
    for start in range(0, splits, MERGED):
        split = start + tl.arange(0, MERGED)
        at = (row * most + split) * heads + head
        inside = split < splits
        part_peaks = tl.load(peaks + at, mask=inside, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(part_peaks, axis=0))
        share = tl.exp2(part_peaks - new_peak)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(share * tl.load(sums + at, mask=inside, other=0.0), axis=0)
        mask = inside[:, None] & (cols < value_width)[None, :]
        parts = tl.load(partial + at[:, None] * value_width + cols[None, :], mask=mask, other=0.0)
        found = found * shrink + tl.sum(share[:, None] * parts, axis=0)
        peak = new_peak
    found = tl.where(splits > 0, found / tl.where(splits > 0, total, 1.0), 0.0)  # a padding row sees nothing
    tl.store(out + row * out_row + head * out_head + cols, found.to(out.dtype.element_ty), mask=cols < value_width)
