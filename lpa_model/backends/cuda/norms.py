"""Norms with the addition to the residual stream before or after them; one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpa_model.backends.cuda.weights import Norm


def add_rms_norm(stream: Tensor, branch: Tensor | None, norm: Norm) -> Tensor:
    """See `twins.add_rms_norm`."""
    rows, d = stream.shape
    out = torch.empty((rows, d), dtype=norm.weight.dtype, device=stream.device)
    other = stream if branch is None else branch
    _add_rms_norm[(rows,)](
        stream,
        other,
        norm.weight,
        out,
        d,
        norm.eps,
        HAS_BRANCH=branch is not None,
        BLOCK=triton.next_power_of_2(d),
        num_warps=_warps(d),
    )
    return out


def add_layer_norm(stream: Tensor, branch: Tensor, norm: Norm) -> Tensor:
    """See `twins.add_layer_norm`."""
    rows, d = stream.shape
    out = torch.empty((rows, d), dtype=norm.weight.dtype, device=stream.device)
    _add_layer_norm[(rows,)](
        stream,
        branch,
        norm.weight,
        norm.bias,
        out,
        d,
        norm.eps,
        BLOCK=triton.next_power_of_2(d),
        num_warps=_warps(d),
    )
    return out


def _warps(d: int) -> int:
    """A row is held whole: 16384 numbers are 64 for each thread of 8 warps."""
    return 4 if d <= 2048 else 8


@triton.jit
def _add_rms_norm(stream, branch, weight, out, d, eps, HAS_BRANCH: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * d
    cols = tl.arange(0, BLOCK)
    inside = cols < d
    x = tl.load(stream + start + cols, mask=inside, other=0.0)
    if HAS_BRANCH:
        x += tl.load(branch + start + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(stream + start + cols, x, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / d + eps)
    y = x * scale * tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + cols, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_layer_norm(stream, branch, weight, bias, out, d, eps, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * d
    cols = tl.arange(0, BLOCK)
    inside = cols < d
    x = tl.load(branch + start + cols, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, axis=0) / d, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / d + eps)
    y = centred * scale * tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(stream + start + cols, mask=inside, other=0.0)
    tl.store(stream + start + cols, y, mask=inside)
    tl.store(out + start + cols, y.to(out.dtype.element_ty), mask=inside)
