"""Tokens drawn from rows of logits by the compiled kernel, on torch's tensors."""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from lpa_model.kernels.launch import Kernel

KERNELS = {
    torch.bfloat16: "lpa_model.kernels.draw.draw_bfloat16",
    torch.float32: "lpa_model.kernels.draw.draw_float32",
}
CALL = Struct("7q")  # `draw.CALL`
NOTHING, UNDECIDED = -1, -2  # `draw.NOTHING`, `draw.UNDECIDED`


def draw_tokens(kernel: Kernel, logits: Tensor, settings: Tensor) -> Tensor:
    """A token of each row, or NOTHING where all logits are -inf, or UNDECIDED where the numbers were not enough.

    logits [rows, vocab], contiguous, of the kernel's dtype; settings float64 [rows, 4 + attempts]: temperature (0: the
    best token of lowest id), top_k (0: all), top_p, min_p and numbers in [0, 1), of which top_p may use more than one
    -> int64 [rows]. A row's token depends on nothing but the row and its settings.
    """
    rows, vocab = logits.shape
    assert logits.is_contiguous() and settings.is_contiguous() and settings.dtype is torch.float64
    tokens = torch.empty(rows, dtype=torch.int64)
    counter = torch.zeros(1, dtype=torch.int64)
    addresses = [tensor.data_ptr() for tensor in (logits, settings, tokens, counter)]
    kernel(CALL.pack(*addresses, rows, vocab, settings.shape[1] - 4), rows)
    return tokens
