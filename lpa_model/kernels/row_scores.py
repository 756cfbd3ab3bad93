"""What rows of logits say of their targets and of their best tokens, by the compiled kernel, on torch's tensors."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from lpa_model.kernels.launch import Kernel

KERNELS = {
    torch.bfloat16: "lpa_model.kernels.score.score_bfloat16",
    torch.float32: "lpa_model.kernels.score.score_float32",
}
CALL = Struct("10q")  # `score.CALL`
LOT = 4  # `score.LOT`


class RowScores(NamedTuple):
    """By row, all [rows]. A row with NaN has NaN for its peak and norm, one with nothing below +inf or above -inf for
    its norm."""

    own: Tensor  # float32: the target's logit
    peak: Tensor  # float32: the largest
    norm: Tensor  # float64: log of the sum of e^(logit - peak)
    best: Tensor  # int64: lowest id of the largest logit, or of the first NaN
    rank: Tensor  # int64: 1 + how many tokens are before the target, by logit, then by id


def row_scores(kernel: Kernel, logits: Tensor, targets: Tensor) -> RowScores:
    """logits float32 or bfloat16 [rows, vocab], as the kernel is, contiguous; targets int64 [rows]."""
    rows, vocab = logits.shape
    assert logits.is_contiguous() and targets.is_contiguous() and KERNELS.keys() >= {logits.dtype}
    floats, integers = torch.empty(2, rows), torch.empty(2, rows, dtype=torch.int64)
    found = RowScores(*floats, torch.empty(rows, dtype=torch.float64), *integers)
    counter = torch.zeros(1, dtype=torch.int64)
    addresses = [tensor.data_ptr() for tensor in (logits, targets, *found, counter)]
    kernel(CALL.pack(*addresses, rows, vocab), -(-rows // LOT))
    return found
