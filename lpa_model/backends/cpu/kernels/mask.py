"""Rows of logits copied as float32 without what a bit mask forbids, as machine code."""

from __future__ import annotations

import numpy as np
from numba import carray, from_dtype, types

from lpa_model.backends.cpu.kernels.machine import ZERO, address, compiled, fetch_add, widen

CALL = np.dtype(
    [
        ("logits", np.int64),  # address of float32 or bfloat16 [rows, vocab]
        ("masks", np.int64),  # of int64 [rows]: addresses of a bit per token, lowest first; 0: no mask
        ("out", np.int64),  # of float32 [rows, vocab]
        ("counter", np.int64),  # of an int64, 0: the next row
        ("rows", np.int64),
        ("vocab", np.int64),
    ]
)


@compiled
def _allowed(row, mask, out):
    """Eight logits at a time, then the rest."""
    for b in range(row.shape[0] // 8):
        bits = np.int32(mask[b])
        for i in range(8):
            out[8 * b + i] = widen(row[8 * b + i]) if bits & (1 << i) else -np.inf
    for i in range(row.shape[0] // 8 * 8, row.shape[0]):
        out[i] = widen(row[i]) if mask[i >> 3] & (1 << (i & 7)) else -np.inf


@compiled
def _work(call, like):
    logits = carray(address(call.logits, like), (call.rows, call.vocab))
    out = carray(address(call.out, ZERO), (call.rows, call.vocab))
    masks = carray(address(call.masks, 0), (call.rows,))
    while True:
        r = fetch_add(call.counter)
        if r >= call.rows:
            return
        if masks[r]:
            _allowed(logits[r], carray(address(masks[r], np.uint8(0)), ((call.vocab + 7) // 8,)), out[r])
        else:
            for i in range(call.vocab):
                out[r, i] = widen(logits[r, i])


SIGNATURE = types.void(types.CPointer(from_dtype(CALL)))


def mask_bfloat16(call):
    _work(carray(call, (1,))[0], np.uint16(0))


def mask_float32(call):
    _work(carray(call, (1,))[0], ZERO)
