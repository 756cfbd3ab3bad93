"""A safetensors file as it is written piece by piece: its header, before any number is known."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal

SAFETENSORS = "application/safetensors"

Tensor = tuple[Literal["F32", "U32", "I64"], Sequence[int]]
"""Type of the numbers, and how many along each axis."""


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What stands before the numbers of tensors, which follow in this order without anything between them."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + int(dtype[1:]) // 8 * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
