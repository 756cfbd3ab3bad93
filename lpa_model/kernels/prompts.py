"""Attention of prompt rows by the compiled kernel, on torch's tensors, for processors with tiles of bfloat16."""

from __future__ import annotations

from struct import Struct

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpa_model.kernels.launch import Kernel
from lpa_model.kernels.records import PROMPT

KERNEL = "lpa_model.kernels.prompt.attend_bfloat16"
PROMPT_BYTES = Struct(f"{len(PROMPT.names or ()) - 1}qd")


def prompt_attention(
    kernel: Kernel,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: int,
    context: int,
    scale: float,
    *,
    hidden: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> Tensor:
    """Causal attention of `batch` texts of one length, of which the first `context` tokens have no query.

    A query's result depends on nothing but itself and the keys and values of the tokens it sees.

    Args:
        kernel: compiled.
        q: bfloat16 [batch * length, H, dh], dh a multiple of 32, a row's numbers side by side, as all that follow.
        keys: bfloat16 [batch * (context + length), H_kv * dh]; consecutive query heads share a key head.
        values: bfloat16 [H_kv * dh, batch * (context + length)], transposed.
        batch: texts.
        context: tokens.
        scale: factor on the scores, 1/sqrt(dh).
        hidden: (starts, ends) int64 [length] of the tokens before it that a query must not see.

    Returns:
        [batch * length, H, dh] bfloat16.
    """
    rows, heads, width = q.shape
    assert q[0].is_contiguous() and keys[0].is_contiguous() and values[0].is_contiguous()
    out = torch.empty(rows, heads, width, dtype=q.dtype)
    counter = np.zeros(1, dtype=np.int64)
    call = PROMPT_BYTES.pack(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        0 if hidden is None else hidden[0].ctypes.data,
        0 if hidden is None else hidden[1].ctypes.data,
        counter.ctypes.data,
        2 * q.stride(0),
        2 * keys.stride(0),
        2 * values.stride(0),
        2 * out.stride(0),
        batch,
        context,
        rows // batch,
        heads,
        keys.shape[1] // width,
        width,
        scale,
    )
    kernel(call, batch * heads)
    return out
