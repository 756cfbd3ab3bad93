"""RMSNorm as machine code: the residual stream in, the next product's input out, in one pass over each row."""

from __future__ import annotations

import numpy as np
from numba import carray, from_dtype, types

from lpa_model.backends.cpu.numba.machine import ZERO, address, compiled, fetch_add, narrow, widen

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
def rms_norm_row(x, weight, out, width, eps, like):
    """x float32 [width] -> out bfloat16 [width], given by their addresses."""
    x = carray(address(x, ZERO), (width,))
    weight = carray(address(weight, like), (width,))
    out = carray(address(out, like), (width,))
    total = ZERO
    for i in range(width):
        total += x[i] * x[i]
    factor = np.float32(1) / np.sqrt(total / np.float32(width) + np.float32(eps))
    for i in range(width):
        normed = widen(narrow(x[i] * factor, like))  # rounded before the weight, as the plain layer does
        out[i] = narrow(normed * widen(weight[i]), like)


@compiled
def add_layer_norm_row(branch, weight, bias, x, out, width, eps, like):
    """x float32 [width] += LayerNorm(branch bfloat16 [width]); out bfloat16 [width] is x then. All are addresses."""
    branch = carray(address(branch, like), (width,))
    weight = carray(address(weight, like), (width,))
    bias = carray(address(bias, like), (width,))
    x = carray(address(x, ZERO), (width,))
    out = carray(address(out, like), (width,))
    total = ZERO
    for i in range(width):
        total += widen(branch[i])
    mean = total / np.float32(width)
    squares = ZERO
    for i in range(width):
        squares += (widen(branch[i]) - mean) * (widen(branch[i]) - mean)
    factor = np.float32(1) / np.sqrt(squares / np.float32(width) + np.float32(eps))
    for i in range(width):
        x[i] += (widen(branch[i]) - mean) * factor * widen(weight[i]) + widen(bias[i])
        out[i] = narrow(x[i], like)


@compiled
def _work(call, like):
    while True:
        start = LOT * fetch_add(call.counter)
        if start >= call.rows:
            return
        for row in range(start, min(start + LOT, call.rows)):
            at = row * call.width
            rms_norm_row(call.x + 4 * at, call.weight, call.out + 2 * at, call.width, call.eps, like)


SIGNATURE = types.void(types.CPointer(from_dtype(CALL)))


def rms_norm_bfloat16(call):
    _work(carray(call, (1,))[0], np.uint16(0))
