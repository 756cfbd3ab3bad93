"""What rows of logits say of their targets and of their best tokens, by the C kernel on torch's tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lpa_model.backends.cpu.args import SCORE
from lpa_model.backends.cpu.library import Kernel, address_of
from lpa_model.backends.cpu.oplist import DTYPES
from lpa_model.backends.cpu.sampling import scratch_bytes
from lpa_model.backends.torch.rows import RowScores

CHUNK_ROWS = 4  # rows that a thread takes at a time: as in csrc/score.c


def score_rows(kernels: Mapping[str, Kernel], logits: Tensor, targets: Tensor, top: int = 0) -> RowScores:
    """logits float32 or bfloat16 [rows, vocab]; targets int64 [rows]; top at most vocab.

    A row's numbers depend on nothing but the row, to the bit. From its logits as they are to the log-probability, the
    error is below 3e-7 of it; below 2e-6 where float32 logits differ by so much that their difference is rounded.
    The list of the best tokens is left open where the norm is NaN, unless it has only one.

    Raises:
        IndexError: a target is not within the vocabulary.
    """
    rows, vocab = logits.shape
    logits = logits.contiguous()
    assert targets.dtype is torch.int64 and 0 <= top <= vocab
    targets = targets.contiguous()
    if rows and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise IndexError(f"a target is not within the vocabulary of {vocab}")
    own, peak = torch.empty(2, rows)
    best, rank = torch.empty(2, rows, dtype=torch.int64)
    norm, top_ids = torch.empty(rows, dtype=torch.float64), torch.empty(rows, top, dtype=torch.int64)
    found = RowScores(own, peak, norm, best, rank, top_ids, torch.empty(rows, top))
    if not rows:
        return found
    counters, size = np.zeros(2, dtype=np.int64), scratch_bytes(vocab)
    scratch = torch.empty(torch.get_num_threads() * size, dtype=torch.uint8)
    places = [tensor.data_ptr() for tensor in (logits, targets, *found, scratch)]
    record = np.array([(DTYPES[logits.dtype], *places, size, counters.ctypes.data, rows, vocab, top)], dtype=SCORE)
    kernels["score_rows"](address_of(record), -(-rows // CHUNK_ROWS))
    return found
