"""RMSNorm and rotary positions of queries and keys, and the step's keys and values into the cache: one kernel.

A program is one row and some heads: of the queries, which it overwrites; of the keys, or of the values, which it writes
to the slot of its row. Behind a key's dh numbers it writes zeros, whatever the block held before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lpa_model.backends.cuda.rows import Rows
from lpa_model.backends.cuda.weights import Heads, Rotary

NUMBERS = (
    2048  # that a program holds at once of each half of its heads, or of its values: 16 for each thread of 4 warps
)


def rotate_and_write(q: Tensor, k: Tensor, v: Tensor, rows: Rows, heads: Heads, keys: Tensor, values: Tensor) -> None:
    """See `twins.rotate_and_write`."""
    rotary, q_norm, k_norm = heads.rotary, heads.q_norm, heads.k_norm
    half = heads.size // 2
    half_block = triton.next_power_of_2(max(half, 1))
    value_block = triton.next_power_of_2(v.shape[2])
    rotate_keys = rotary is not None and not heads.keys_latent
    key_block = half_block if rotate_keys else triton.next_power_of_2(k.shape[2])
    some_q, some_k = _together(q.shape[1], half_block), _together(k.shape[1], key_block)
    some_v = _together(v.shape[1], value_block)
    q_programs = 0 if rotary is None else triton.cdiv(q.shape[1], some_q)  # without positions nothing happens to them
    k_programs, v_programs = triton.cdiv(k.shape[1], some_k), triton.cdiv(v.shape[1], some_v)
    cos, sin = (q, q) if rotary is None else rotary
    _rotate_and_write[(len(q), q_programs + k_programs + v_programs)](
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
        q.shape[1],
        k.shape[1],
        v.shape[1],
        k.shape[2],
        v.shape[2],
        q_programs,
        k_programs,
        HALF=half,
        BLOCK_SIZE=keys.shape[2],
        ROTATE=rotary is not None,
        ROTATE_KEYS=rotate_keys,
        NORM=q_norm is not None,
        HALF_BLOCK=half_block,
        KEY_BLOCK=key_block,
        VALUE_BLOCK=value_block,
        SOME_Q=some_q,
        SOME_K=some_k,
        SOME_V=some_v,
        num_warps=4,
    )


def rotate(x: Tensor, positions: Tensor, rotary: Rotary) -> None:
    """See `twins.rotate`."""
    rows, heads = x.shape[:2]
    half = rotary.cos.shape[1]
    half_block = triton.next_power_of_2(half)
    some = _together(heads, half_block)
    _rotate[(rows, triton.cdiv(heads, some))](
        x,
        positions,
        *rotary,
        *x.stride()[:2],
        heads,
        HALF=half,
        HALF_BLOCK=half_block,
        SOME=some,
        num_warps=4,
    )


def _together(heads: int, block: int) -> int:
    """Heads of one program, a power of 2."""
    whole: int = triton.next_power_of_2(heads)
    return min(whole, max(1, NUMBERS // block))


@triton.jit
def _rotated(
    x,  # of one row
    first_head,
    heads,
    head_stride,
    to,
    to_stride,
    weight,
    eps,
    position,
    cos,
    sin,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    SOME: tl.constexpr,
):
    """SOME of x's heads, normalised and rotated, to `to`: number i of a head pairs with i + dh/2."""
    head = first_head + tl.arange(0, SOME)
    i = tl.arange(0, HALF_BLOCK)
    within = i < HALF
    mask = (head < heads)[:, None] & within[None, :]
    at = x + head[:, None] * head_stride + i[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = 1.0 / tl.sqrt(squares / (2 * HALF) + eps)[:, None]
        first *= scale * tl.load(weight + i, mask=within, other=0.0).to(tl.float32)[None, :]
        second *= scale * tl.load(weight + HALF + i, mask=within, other=0.0).to(tl.float32)[None, :]
    c = tl.load(cos + position * HALF + i, mask=within, other=0.0)[None, :]
    s = tl.load(sin + position * HALF + i, mask=within, other=0.0)[None, :]
    target = to + head[:, None] * to_stride + i[None, :]
    tl.store(target, (first * c - second * s).to(to.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (second * c + first * s).to(to.dtype.element_ty), mask=mask)


@triton.jit
def _copied(x, first_head, heads, head_stride, to, to_stride, width, BLOCK: tl.constexpr, SOME: tl.constexpr):
    """SOME of x's heads to `to`."""
    head = (first_head + tl.arange(0, SOME))[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (i < width)
    tl.store(to + head * to_stride + i, tl.load(x + head * head_stride + i, mask=mask), mask=mask)


@triton.jit
def _store_keys(
    x,
    first_head,
    heads,
    head_stride,
    to,
    to_stride,
    width,
    weight,
    eps,
    position,
    cos,
    sin,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """SOME heads of keys, rotated or as they are; zeros behind a rotated one."""
    if ROTATE:
        _rotated(
            x,
            first_head,
            heads,
            head_stride,
            to,
            to_stride,
            weight,
            eps,
            position,
            cos,
            sin,
            HALF,
            NORM,
            HALF_BLOCK,
            SOME,
        )
        head = (first_head + tl.arange(0, SOME))[:, None]
        pad = (2 * HALF + tl.arange(0, 16))[None, :]  # widths are padded to multiples of 16
        zeros = tl.zeros((SOME, 16), dtype=to.dtype.element_ty)
        tl.store(to + head * to_stride + pad, zeros, mask=(head < heads) & (pad < width))
    else:
        _copied(x, first_head, heads, head_stride, to, to_stride, width, BLOCK, SOME)


@triton.jit(do_not_specialize=["heads"])
def _rotate(
    x, positions, cos, sin, x_row, x_head, heads, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, SOME: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = x + row * x_row
    position = tl.load(positions + row).to(tl.int64)
    first = tl.program_id(1) * SOME
    _rotated(at, first, heads, x_head, at, x_head, cos, 0.0, position, cos, sin, HALF, False, HALF_BLOCK, SOME)


@triton.jit(do_not_specialize=["q_heads", "k_heads", "v_heads", "q_programs", "k_programs"])
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
    q_heads,
    k_heads,
    v_heads,
    key_width,
    value_width,
    q_programs,
    k_programs,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTATE: tl.constexpr,
    ROTATE_KEYS: tl.constexpr,
    NORM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SOME_Q: tl.constexpr,
    SOME_K: tl.constexpr,
    SOME_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    position = tl.load(positions + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    block = slot // BLOCK_SIZE
    token = slot % BLOCK_SIZE
    written = (slot >= 0).to(tl.int32)
    # names that two branches share would have to be of one shape: each branch only calls
    if program < q_programs:
        if ROTATE:
            _rotated(
                q + row * q_row,
                program * SOME_Q,
                q_heads,
                q_head,
                q + row * q_row,
                q_head,
                q_weight,
                eps,
                position,
                cos,
                sin,
                HALF,
                NORM,
                HALF_BLOCK,
                SOME_Q,
            )
    elif program < q_programs + k_programs:
        _store_keys(
            k + row * k_row,
            (program - q_programs) * SOME_K,
            k_heads * written,
            k_head,
            keys + block * key_block + token * key_token,
            key_head,
            key_width,
            k_weight,
            eps,
            position,
            cos,
            sin,
            HALF,
            NORM,
            HALF_BLOCK,
            SOME_K,
            KEY_BLOCK,
            ROTATE_KEYS,
        )
    else:
        _copied(
            v + row * v_row,
            (program - q_programs - k_programs) * SOME_V,
            v_heads * written,
            v_head,
            values + block * value_block + token * value_token,
            value_head,
            value_width,
            VALUE_BLOCK,
            SOME_V,
        )
