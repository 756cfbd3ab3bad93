"""Which instructions that multiply pairs of bfloat16 the processor has."""

from __future__ import annotations

from functools import cache

import torch

TILES = "AMX"
VECTORS = "AVX512-BF16"  # which all processors with tiles have, too


@cache
def paired_products() -> tuple[str, ...]:
    """Those that there are, the best first; with TILES among them, the process may use tiles from here on."""
    asked = ((TILES, "_init_amx"), (VECTORS, "_is_avx512_bf16_supported"))  # private functions of torch.cpu
    return tuple(name for name, question in asked if getattr(torch.cpu, question, lambda: False)())
