"""RMSNorm and rotary positions of queries and keys, and the step's keys and values into the cache: one kernel.

A program is one row and one head: of the queries, which it overwrites; of the keys, and of the values, which it writes
to the slot of its row. Behind a key's dh numbers it writes zeros, whatever the block held before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lpa_model.backends.cuda.rows import Rows
from lpa_model.backends.cuda.weights import Heads, Rotary


def rotate_and_write(q: Tensor, k: Tensor, v: Tensor, rows: Rows, heads: Heads, keys: Tensor, values: Tensor) -> None:
    """See `twins.rotate_and_write`."""
    rotary = heads.rotary
    queries = 0 if rotary is None else q.shape[1]  # without positions nothing happens to them
    half = heads.size // 2
    cos, sin = (q, q) if rotary is None else rotary
    q_norm, k_norm = heads.q_norm, heads.k_norm
    _rotate_and_write[(len(q), queries + k.shape[1] + v.shape[1])](
        q,
        k,
        v,
        keys,
        values,
        rows.positions,
        rows.slots,
        cos,
        sin,
        cos if q_norm is None else q_norm.weight,
        cos if k_norm is None else k_norm.weight,
        0.0 if q_norm is None else q_norm.eps,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        k.shape[2],
        v.shape[2],
        QUERIES=queries,
        KEYS=k.shape[1],
        HALF=half,
        BLOCK_SIZE=keys.shape[2],
        ROTATE_KEYS=rotary is not None and not heads.keys_latent,
        NORM=q_norm is not None,
        HALF_BLOCK=triton.next_power_of_2(max(half, 1)),
        KEY_BLOCK=triton.next_power_of_2(k.shape[2]),
        VALUE_BLOCK=triton.next_power_of_2(v.shape[2]),
        num_warps=1,  # a head is 256 numbers at most, a latent 1024
    )


def rotate(x: Tensor, positions: Tensor, rotary: Rotary) -> None:
    """See `twins.rotate`."""
    half = rotary.cos.shape[1]
    _rotate[x.shape[:2]](
        x,
        positions,
        *rotary,
        *x.stride()[:2],
        HALF=half,
        HALF_BLOCK=triton.next_power_of_2(half),
        num_warps=1,
    )


@triton.jit
def _rotated(x, weight, eps, position, cos, sin, HALF: tl.constexpr, NORM: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """Both halves of a head, float32."""
    i = tl.arange(0, HALF_BLOCK)
    inside = i < HALF
    first = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + HALF + i, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt((tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / (2 * HALF) + eps)
        first *= scale * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
        second *= scale * tl.load(weight + HALF + i, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + position * HALF + i, mask=inside, other=0.0)
    s = tl.load(sin + position * HALF + i, mask=inside, other=0.0)
    return first * c - second * s, second * c + first * s


@triton.jit
def _store_halves(to, first, second, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr):
    i = tl.arange(0, HALF_BLOCK)
    tl.store(to + i, first.to(to.dtype.element_ty), mask=i < HALF)
    tl.store(to + HALF + i, second.to(to.dtype.element_ty), mask=i < HALF)


@triton.jit
def _rotate(x, positions, cos, sin, x_row, x_head, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = x + row * x_row + tl.program_id(1) * x_head
    position = tl.load(positions + row).to(tl.int64)
    first, second = _rotated(at, cos, 0.0, position, cos, sin, HALF, False, HALF_BLOCK)
    _store_halves(at, first, second, HALF, HALF_BLOCK)


@triton.jit
def _rotate_and_write(
    q,
    k,
    v,
    keys,
    values,
    positions,
    slots,
    cos,
    sin,
    q_weight,
    k_weight,
    eps,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    key_block,
    key_head,
    key_token,
    value_block,
    value_head,
    value_token,
    key_width,
    value_width,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTATE_KEYS: tl.constexpr,
    NORM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    block = slot // BLOCK_SIZE
    token = slot % BLOCK_SIZE
    if head < QUERIES:
        at = q + row * q_row + head * q_head
        first, second = _rotated(at, q_weight, eps, position, cos, sin, HALF, NORM, HALF_BLOCK)
        _store_halves(at, first, second, HALF, HALF_BLOCK)
    elif slot >= 0:
        if head < QUERIES + KEYS:
            mine = head - QUERIES
            at = k + row * k_row + mine * k_head
            to = keys + block * key_block + mine * key_head + token * key_token
            i = tl.arange(0, KEY_BLOCK)
            if ROTATE_KEYS:
                first, second = _rotated(at, k_weight, eps, position, cos, sin, HALF, NORM, HALF_BLOCK)
                _store_halves(to, first, second, HALF, HALF_BLOCK)
                zeros = tl.zeros((KEY_BLOCK,), dtype=keys.dtype.element_ty)
                tl.store(to + i, zeros, mask=(i >= 2 * HALF) & (i < key_width))
            else:
                tl.store(to + i, tl.load(at + i, mask=i < key_width), mask=i < key_width)
        else:
            mine = head - QUERIES - KEYS
            at = v + row * v_row + mine * v_head
            to = values + block * value_block + mine * value_head + token * value_token
            i = tl.arange(0, VALUE_BLOCK)
            tl.store(to + i, tl.load(at + i, mask=i < value_width), mask=i < value_width)
