"""The operations of a step as kernels in Triton; importing this needs triton (CUDA builds of torch bring it along)."""

from __future__ import annotations

from functools import partial

from lpa_model.backends.cuda.decode import decode_attention
from lpa_model.backends.cuda.gemm import grouped_linear, linear, per_head
from lpa_model.backends.cuda.norms import add_layer_norm, add_rms_norm
from lpa_model.backends.cuda.ops import Ops
from lpa_model.backends.cuda.prompt import prompt_attention
from lpa_model.backends.cuda.rope import rotate, rotate_and_write
from lpa_model.backends.cuda.swiglu import swiglu


def kernels(batch_invariant: bool) -> Ops:
    """`batch_invariant`: every product takes the kernel whose sums do not depend on the number of rows, also where
    cuBLAS would be faster."""
    return Ops(
        add_rms_norm,
        add_layer_norm,
        partial(linear, invariant=batch_invariant),
        partial(grouped_linear, invariant=batch_invariant),
        per_head,
        swiglu,
        rotate_and_write,
        rotate,
        decode_attention,
        prompt_attention,
    )
