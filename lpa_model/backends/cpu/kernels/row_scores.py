"""What rows of logits say of their targets and of their best tokens, by the compiled kernel, on torch's tensors."""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from lpa_model.backends.cpu.kernels.launch import Kernel
from lpa_model.backends.torch.rows import RowScores

KERNELS = {
    torch.bfloat16: "lpa_model.backends.cpu.kernels.score.score_bfloat16",
    torch.float32: "lpa_model.backends.cpu.kernels.score.score_float32",
}
CALL = Struct("13q")  # `score.CALL`
LOT = 4  # `score.LOT`


def row_scores(kernel: Kernel, logits: Tensor, targets: Tensor, top: int = 0) -> RowScores:
    """logits [rows, vocab], contiguous, of the kernel's dtype; targets int64 [rows]; top at most vocab.

    A row's numbers depend on nothing but the row, to the bit. From its logits as they are to the log-probability, the
    error is below 3e-7 of it; below 2e-6 where float32 logits differ by so much that their difference is rounded.
    The list of the best tokens is left open where the norm is NaN, unless it has only one.

    Raises:
        IndexError: a target is not within the vocabulary.
    """
    rows, vocab = logits.shape
    assert logits.is_contiguous() and targets.dtype is torch.int64 and 0 <= top <= vocab
    targets = targets.contiguous()
    if rows and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise IndexError(f"a target is not within the vocabulary of {vocab}")
    own, peak = torch.empty(2, rows)
    best, rank = torch.empty(2, rows, dtype=torch.int64)
    norm, top_ids = torch.empty(rows, dtype=torch.float64), torch.empty(rows, top, dtype=torch.int64)
    found = RowScores(own, peak, norm, best, rank, top_ids, torch.empty(rows, top))
    counter = torch.zeros(1, dtype=torch.int64)
    addresses = [tensor.data_ptr() for tensor in (logits, targets, *found, counter)]
    kernel(CALL.pack(*addresses, rows, vocab, top), -(-rows // LOT))
    return found
