"""The process's memory: freed memory that glibc keeps, and what is released to the system."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

# glibc's mallopt (malloc.h)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LIMIT = 1 << 30  # bytes
MADV_DONTNEED = 4  # Linux's madvise
SMAPS = Path("/proc/self/smaps")
# a mapping of a library's code, and how much of it has been written to
CODE = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) r-xp \S+ \S+ \S+ +/.*\n(?:\w+: .*\n)*?Private_Dirty: +(\d+) kB$", re.MULTILINE
)


def share_one_heap() -> None:
    """Have all threads allocate from one heap of glibc: what a thread leaves free in a heap of its own stays there.

    To be called before there are such threads.
    """
    if (mallopt := _mallopt()) is not None:
        mallopt(M_ARENA_MAX, 1)


def retain_freed_memory() -> bool:
    """Have glibc reuse the memory of freed tensors.

    A step frees tensors of many megabytes and allocates the same again. By default glibc unmaps them, so that every
    page faults and is zeroed again. Returns whether mallopt took the settings: other C libraries have none.
    """
    mallopt = _mallopt()
    if mallopt is None:
        return False
    return all([mallopt(name, LIMIT) for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)])


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's function; None in another C library."""
    mallopt: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt


def release_freed_memory() -> None:
    """Release to the system what loading a model has left free in glibc's heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def release_code() -> int:
    """Release the pages of the libraries' code, most of which only the start needs: what is called is mapped again.

    The pages come from files and stay in the page cache while memory is free. Returns the bytes of the mappings; 0
    where the system has no /proc/self/smaps.
    """
    if not SMAPS.exists():
        return 0
    libc, total = ctypes.CDLL(None), 0
    for start, end, dirty in CODE.findall(SMAPS.read_text()):
        size = int(end, 16) - int(start, 16)
        if dirty == "0" and not libc.madvise(ctypes.c_void_p(int(start, 16)), ctypes.c_size_t(size), MADV_DONTNEED):
            total += size
    return total
