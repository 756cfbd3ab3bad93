"""Tokens drawn from rows of logits by the compiled kernel, on torch's tensors."""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from lpa_model.backends.cpu.kernels.launch import Kernel

KERNELS = {
    torch.bfloat16: "lpa_model.backends.cpu.kernels.draw.draw_bfloat16",
    torch.float32: "lpa_model.backends.cpu.kernels.draw.draw_float32",
}
CALL = Struct("7q")  # `draw.CALL`


def draw_tokens(kernel: Kernel, logits: Tensor, settings: Tensor) -> Tensor:
    """As `lpa_model.backends.torch.rows.draw_tokens`, of contiguous logits of the kernel's dtype."""
    rows, vocab = logits.shape
    assert logits.is_contiguous() and settings.is_contiguous() and settings.dtype is torch.float64
    tokens = torch.empty(rows, dtype=torch.int64)
    counter = torch.zeros(1, dtype=torch.int64)
    addresses = [tensor.data_ptr() for tensor in (logits, settings, tokens, counter)]
    kernel(CALL.pack(*addresses, rows, vocab, settings.shape[1] - 4), rows)
    return tokens
