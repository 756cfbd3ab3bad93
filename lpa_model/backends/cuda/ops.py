"""The operations of a step, of which there are two sets: kernels in Triton (`kernels`) and plain torch (`twins`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lpa_model.backends.cuda.rows import Decodes, Prompts, Rows
from lpa_model.backends.cuda.weights import Grouped, Heads, KeyUp, Matrix, Norm, PerHead, Rotary


class Ops(NamedTuple):
    """Functions of tensors on one device; `twins` defines each in plain torch, with shapes and dtypes."""

    add_rms_norm: Callable[[Tensor, Tensor | None, Norm], Tensor]
    add_layer_norm: Callable[[Tensor, Tensor, Norm], Tensor]
    linear: Callable[[Tensor, Matrix], Tensor]
    grouped_linear: Callable[[Tensor, Grouped], Tensor]
    per_head: Callable[[Tensor, PerHead, Tensor], None]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    rotate_and_write: Callable[[Tensor, Tensor, Tensor, Rows, Heads, Tensor, Tensor], None]
    rotate: Callable[[Tensor, Tensor, Rotary], None]
    decode_attention: Callable[[Tensor, Tensor, Tensor, Decodes, float, KeyUp | None, Tensor], None]
    prompt_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Prompts, float, Tensor], None]
