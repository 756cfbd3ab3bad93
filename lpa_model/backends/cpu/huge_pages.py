"""Memory for weights in pages of 2 MB, where Linux gives them to those who ask (`madvise` or `always` in
/sys/kernel/mm/transparent_hugepage/enabled): each step reads all weights, and a page's address is looked up once.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 32 * 2**20  # bytes that are asked for at a time; they take memory when something is written to them
CACHE_LINE = 64


class HugePages:
    """Tensors one behind the other, so that small ones share a page. Memory is freed with the tensors in it."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, not initialised, at the start of a cache line."""
        num_bytes = math.prod(shape) * dtype.itemsize
        size = -(-num_bytes // CACHE_LINE) * CACHE_LINE
        if size > len(self._free):
            memory = mmap.mmap(-1, max(size, CHUNK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._free = torch.frombuffer(memory, dtype=torch.uint8)
        place, self._free = self._free[:num_bytes], self._free[size:]
        return place.view(dtype).view(*shape)
