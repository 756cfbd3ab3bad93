"""How the process's allocator treats the tensors of a step."""

from __future__ import annotations

import ctypes
import ctypes.util

# glibc's mallopt (malloc.h)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LIMIT = 1 << 30  # bytes


def keep_freed_memory() -> bool:
    """Have glibc keep the memory of freed tensors for the next ones, in one arena for all threads.

    A step frees tensors of many megabytes and allocates the same again. Left to itself, glibc gives them back to the
    system, which hands out every page anew, zeroed; and every thread that allocates keeps a heap of its own. Returns
    whether it did: other C libraries have no such switch.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, LIMIT), (M_TRIM_THRESHOLD, LIMIT))
    return all([mallopt(name, value) for name, value in settings])


def give_back_freed_memory() -> None:
    """Have glibc give to the system what loading a model has left free."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
