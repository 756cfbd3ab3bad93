"""RMSNorm as machine code: the residual stream in, the next product's input out, in one pass over each row."""

from __future__ import annotations

import numpy as np
from numba import carray, from_dtype, types

from lpa_model.kernels.machine import ZERO, address, compiled, fetch_add, narrow, widen

CALL = np.dtype(
    [
        ("x", np.int64),  # address of float32 [rows, width]
        ("weight", np.int64),  # of bfloat16 [width]
        ("out", np.int64),  # of bfloat16 [rows, width]
        ("counter", np.int64),  # of an int64, 0: the next lot of rows
        ("rows", np.int64),
        ("width", np.int64),
        ("eps", np.float64),
    ]
)
LOT = 16  # rows that one thread takes at a time


@compiled
def _work(call, like):
    x = carray(address(call.x, ZERO), (call.rows, call.width))
    weight = carray(address(call.weight, like), (call.width,))
    out = carray(address(call.out, like), (call.rows, call.width))
    while True:
        start = LOT * fetch_add(call.counter)
        if start >= call.rows:
            return
        for row in range(start, min(start + LOT, call.rows)):
            total = ZERO
            for i in range(call.width):
                total += x[row, i] * x[row, i]
            factor = np.float32(1) / np.sqrt(total / np.float32(call.width) + np.float32(call.eps))
            for i in range(call.width):
                # rounded before the weight, as the plain layer does
                normed = widen(narrow(x[row, i] * factor, like))
                out[row, i] = narrow(normed * widen(weight[i]), like)


SIGNATURE = types.void(types.CPointer(from_dtype(CALL)))


def rms_norm_bfloat16(call):
    _work(carray(call, (1,))[0], np.uint16(0))
