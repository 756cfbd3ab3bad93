"""Products of few rows: they read a weight once, and their sums have one order whatever the number of rows.

Rows are computed in tiles of 16, the least that `tl.dot` takes, with rows of zeros behind the last. Each output is one
sum over the whole input in chunks of BLOCK_K, so that a row's bits depend on the row alone. More rows than FEW go to
torch's product (cuBLAS), which chooses its order by the number of rows; with `invariant` they come here as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpa_model.backends.cuda import twins
from lpa_model.backends.cuda.weights import Grouped, Matrix, PerHead

FEW = 16
ROWS = tl.constexpr(16)


def linear(x: Tensor, matrix: Matrix, invariant: bool = False) -> Tensor:
    """See `twins.linear`."""
    if len(x) > FEW and not invariant:
        return twins.linear(x, matrix)
    out = torch.empty((len(x), len(matrix.weight)), dtype=x.dtype, device=x.device)
    _launch(x, matrix.weight, matrix.bias, None, out, _block_n(len(matrix.weight)))
    return out


def grouped_linear(x: Tensor, grouped: Grouped, invariant: bool = False) -> Tensor:
    """See `twins.grouped_linear`."""
    if len(x) > FEW and not invariant:
        return twins.grouped_linear(x, grouped)
    out = torch.empty((len(x), len(grouped.weight)), dtype=x.dtype, device=x.device)
    block = _block_n(len(grouped.weight))
    while any(segment.start % block or segment.stop % block for segment in grouped.segments):
        block //= 2  # a program's outputs read the same columns; segments are multiples of 16
    _launch(x, grouped.weight, grouped.bias, grouped.columns, out, block)
    return out


def per_head(x: Tensor, up: PerHead, out: Tensor) -> None:
    """See `twins.per_head`."""
    rows, heads, ins = x.shape
    outs = out.shape[2]
    bias = x if up.bias is None else up.bias
    _per_head[(triton.cdiv(outs, 32), heads, triton.cdiv(rows, FEW))](
        x,
        up.weight,
        bias,
        out,
        rows,
        outs,
        ins,
        *x.stride()[:2],
        *up.weight.stride(),
        *out.stride()[:2],
        GROUP=heads // len(up.weight),
        HAS_BIAS=up.bias is not None,
        BLOCK_N=32,
        BLOCK_K=_block_k(x),
        num_warps=4,
        num_stages=2,
    )


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None, out: Tensor, block_n: int) -> None:
    rows, (outs, ins) = len(x), weight.shape
    assert x.stride(1) == weight.stride(1) == out.stride(1) == 1
    _linear[(triton.cdiv(outs, block_n), triton.cdiv(rows, FEW))](
        x,
        weight,
        weight if bias is None else bias,
        weight if columns is None else columns,
        out,
        rows,
        outs,
        ins,
        x.shape[1],
        x.stride(0),
        weight.stride(0),
        HAS_BIAS=bias is not None,
        GROUPED=columns is not None,
        BLOCK_N=block_n,
        BLOCK_K=_block_k(x),
        num_warps=2 if block_n == 16 else 4,
        num_stages=3,
    )


def _block_n(outs: int) -> int:
    """Outputs of a program, by the weight alone: few, so that a small weight is shared out to many processors; a
    large one has programs enough."""
    return 16 if outs <= 4096 else 32 if outs <= 16384 else 64


def _block_k(x: Tensor) -> int:
    """512 bytes of each row and output at a time: with 64 outputs and 3 stages 120 KB of shared memory at most."""
    return 256 if x.dtype is torch.bfloat16 else 128


@triton.jit(do_not_specialize=["rows", "width"])  # one variant for every number of rows
def _linear(
    x,
    weight,
    bias,
    columns,
    out,
    rows,
    outs,
    ins,
    width,
    x_row,
    weight_row,
    HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    column = 0
    if GROUPED:
        column = tl.load(columns + block * (BLOCK_N // 16))
    x_rows = x + row.to(tl.int64)[:, None] * x_row
    weight_rows = weight + n.to(tl.int64)[None, :] * weight_row
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for start in range(0, ins, BLOCK_K):
        at = start + k
        mine = (row < rows)[:, None] & (at < ins)[None, :] & (column + at < width)[None, :]
        a = tl.load(x_rows + (column + at)[None, :], mask=mine, other=0.0)
        b = tl.load(weight_rows + at[:, None], mask=(at < ins)[:, None] & (n < outs)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < outs, other=0.0).to(tl.float32)[None, :]
    to = out + row.to(tl.int64)[:, None] * outs + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (n < outs)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _per_head(
    x,
    weight,
    bias,
    out,
    rows,
    outs,
    ins,
    x_row,
    x_head,
    weight_head,
    weight_out,
    weight_in,
    out_row,
    out_head,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1)
    row = (tl.program_id(2) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_rows = x + row[:, None] * x_row + head * x_head
    weight_rows = weight + (head // GROUP).to(tl.int64) * weight_head + n[None, :] * weight_out
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for start in range(0, ins, BLOCK_K):
        at = start + k
        a = tl.load(x_rows + at[None, :], mask=(row < rows)[:, None] & (at < ins)[None, :], other=0.0)
        inside = (at < ins)[:, None] & (n < outs)[None, :]
        b = tl.load(weight_rows + at[:, None] * weight_in, mask=inside, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + (head // GROUP) * outs + n, mask=n < outs, other=0.0).to(tl.float32)[None, :]
    to = out + row[:, None] * out_row + head * out_head + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (n < outs)[None, :])
