"""The kernels' arguments as numpy records, as csrc/records.h has them: `library` checks them when it is loaded.

Every field is 8 bytes: an address or a count as int64, or a float64. What each one means stands in records.h.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Dtype(IntEnum):
    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT4 = 3


class OpKind(IntEnum):
    GEMM = 0
    RMS_NORM = 1
    HEAD_RMS_NORM = 2
    ADD_LAYER_NORM = 3
    SWIGLU = 4
    ATTENTION_DECODE = 5
    CACHE_WRITE = 6
    PACK_VALUES = 7
    ATTENTION_PROMPT = 8


class Epilogue(IntEnum):
    STORE = 0
    RELU = 1
    SWIGLU_GATED = 2
    RESIDUAL_ADD = 3


def _record(integers: str, doubles: str = "") -> np.dtype[np.void]:
    return np.dtype([(name, np.int64) for name in integers.split()] + [(name, np.float64) for name in doubles.split()])


OP = _record(
    """
    kind dtype weight_dtype x weight bias residual out x_stride weight_stride residual_stride out_stride
    width columns panels group_panels epilogue heads head_stride
    """,
    "eps",
)
OP_LIST = _record("ops num_ops rows lanes counters")
ATTENTION = _record(
    """
    dtype cache_dtype q new_keys new_values keys values key_scales value_scales out rope
    partial stats positions lengths tables table_starts item_rows first_items counters
    rows items heads key_heads value_heads key_width value_width query_stride key_stride value_stride out_stride
    block_size split_blocks
    prompt_positions prompt_slots shared_ends own_starts prompt_tables spans block_spans query_tiles
    prompt_rows num_spans prompt_blocks num_query_tiles packed_values packed_value_tiles
    """,
    "scale",
)
DRAW = _record("dtype logits settings tokens scratch scratch_bytes counters rows vocab attempts")
MASK = _record("dtype logits masks out counters rows vocab")
SCORE = _record(
    """
    dtype logits targets own peak norm best rank top_ids top_logits
    scratch scratch_bytes counters rows vocab top
    """
)
RECORDS = {"op": OP, "op_list": OP_LIST, "attention": ATTENTION, "draw": DRAW, "mask": MASK, "score": SCORE}
"""Every record by its name in records.h."""
