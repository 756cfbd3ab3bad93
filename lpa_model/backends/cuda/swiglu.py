"""silu(gate) · up, on columns of one product's result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `twins.swiglu`."""
    rows, width = gate.shape
    out = torch.empty((rows, width), dtype=gate.dtype, device=gate.device)
    _swiglu[(rows, triton.cdiv(width, BLOCK))](
        gate, up, out, width, gate.stride(0), up.stride(0), BLOCK=BLOCK, num_warps=4
    )
    return out


@triton.jit
def _swiglu(gate, up, out, width, gate_row, up_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(gate + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + cols, (x * tl.sigmoid(x) * y).to(out.dtype.element_ty), mask=inside)
