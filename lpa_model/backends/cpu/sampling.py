"""Tokens drawn from rows of logits, and rows copied without what masks forbid, by the C kernels on torch's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lpa_model.backends.cpu.args import DRAW, MASK
from lpa_model.backends.cpu.library import Kernel, address_of
from lpa_model.backends.cpu.oplist import DTYPES

COLUMNS, SUM_BLOCK = 1024, 128  # as in csrc/logits.h


def scratch_bytes(vocab: int) -> int:
    """What one thread needs: csrc/logits.h, take_scratch."""
    return 4 * (COLUMNS + -(-vocab // SUM_BLOCK) + 2 * vocab)


def draw_tokens(kernels: Mapping[str, Kernel], logits: Tensor, settings: Tensor) -> Tensor:
    """A token of each row, or NOTHING, or UNDECIDED, as `lpa_model.backends.torch.rows.draw_tokens` defines it.

    Args:
        kernels: of one instruction set, from `Library.kernels`.
        logits: float32 or bfloat16 [rows, vocab].
        settings: float64 [rows, 4 + attempts]: temperature (0: the best token of lowest id), top_k (0: all), top_p,
            min_p and numbers in [0, 1), of which top_p may use more than one.

    Returns:
        int64 [rows].
    """
    rows, vocab = logits.shape
    logits = logits.contiguous()
    assert settings.is_contiguous() and settings.dtype is torch.float64
    tokens = torch.empty(rows, dtype=torch.int64)
    if not rows:
        return tokens
    counters, size = np.zeros(2, dtype=np.int64), scratch_bytes(vocab)
    threads = min(rows, torch.get_num_threads())
    scratch = torch.empty(torch.get_num_threads() * size, dtype=torch.uint8)
    places = [tensor.data_ptr() for tensor in (logits, settings, tokens, scratch)]
    attempts = settings.shape[1] - 4
    record = np.array([(DTYPES[logits.dtype], *places, size, counters.ctypes.data, rows, vocab, attempts)], dtype=DRAW)
    kernels["draw_tokens"](address_of(record), threads)
    return tokens


def mask_logits(kernels: Mapping[str, Kernel], logits: Tensor, masks: Sequence[npt.NDArray[np.uint8] | None]) -> Tensor:
    """logits float32 or bfloat16 [rows, vocab] -> float32 [rows, vocab], -inf where a row's mask has 0.

    A mask has a bit for each token, lowest first, in vocab / 8 bytes or more; None forbids nothing.
    """
    rows, vocab = logits.shape
    logits = logits.contiguous()
    assert len(masks) == rows
    assert all(mask is None or (mask.flags.c_contiguous and 8 * mask.nbytes >= vocab) for mask in masks)
    addresses = np.array([0 if mask is None else mask.ctypes.data for mask in masks], dtype=np.int64)
    out = torch.empty(rows, vocab)
    counter = np.zeros(1, dtype=np.int64)
    places = (logits.data_ptr(), addresses.ctypes.data, out.data_ptr(), counter.ctypes.data)
    record = np.array([(DTYPES[logits.dtype], *places, rows, vocab)], dtype=MASK)
    kernels["mask_logits"](address_of(record), rows)
    return out
