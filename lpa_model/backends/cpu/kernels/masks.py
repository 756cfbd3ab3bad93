"""Rows of logits copied without what masks forbid, by the compiled kernel, on torch's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lpa_model.backends.cpu.kernels.launch import Kernel

KERNELS = {
    torch.bfloat16: "lpa_model.backends.cpu.kernels.mask.mask_bfloat16",
    torch.float32: "lpa_model.backends.cpu.kernels.mask.mask_float32",
}
CALL = Struct("6q")  # `mask.CALL`


def copy_allowed(kernel: Kernel, logits: Tensor, masks: Sequence[npt.NDArray[np.uint8] | None]) -> Tensor:
    """logits [rows, vocab], contiguous, of the kernel's dtype -> float32 [rows, vocab], -inf where a row's mask has 0.

    A mask has a bit per token, lowest first, in vocab / 8 bytes or more.
    """
    rows, vocab = logits.shape
    assert logits.is_contiguous()
    assert all(mask is None or (mask.flags.c_contiguous and 8 * mask.nbytes >= vocab) for mask in masks)
    places = torch.tensor([0 if mask is None else mask.ctypes.data for mask in masks])
    out = torch.empty(rows, vocab)
    counter = torch.zeros(1, dtype=torch.int64)
    addresses = [tensor.data_ptr() for tensor in (logits, places, out, counter)]
    kernel(CALL.pack(*addresses, rows, vocab), rows)
    return out
