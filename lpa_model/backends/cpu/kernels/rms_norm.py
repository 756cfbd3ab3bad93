"""RMSNorm by the compiled kernel, on torch's tensors."""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from lpa_model.backends.cpu.kernels.launch import Kernel

KERNEL = "lpa_model.backends.cpu.kernels.norm.rms_norm_bfloat16"
CALL = Struct("6qd")  # `norm.CALL`
LOT = 16  # `norm.LOT`


def rms_norm(kernel: Kernel, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x float32 [rows, size], contiguous; weight bfloat16 [size] -> bfloat16 [rows, size]."""
    rows, size = x.shape
    assert x.is_contiguous() and x.dtype is torch.float32
    out = torch.empty(rows, size, dtype=torch.bfloat16)
    counter = torch.zeros(1, dtype=torch.int64)
    call = CALL.pack(x.data_ptr(), weight.data_ptr(), out.data_ptr(), counter.data_ptr(), rows, size, eps)
    kernel(call, -(-rows // LOT))
    return out
