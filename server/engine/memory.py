"""The process's memory: freed memory that glibc keeps, and what is released to the system."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
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


def retain_freed_memory() -> bool:
    """Have glibc reuse the memory of freed tensors, in one arena for all threads.

    A step frees tensors of many megabytes and allocates the same again. By default glibc unmaps them,
    so that every page faults and is zeroed again, and every thread that allocates has a heap of its own. Returns
    whether mallopt took the settings: other C libraries have none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, LIMIT), (M_TRIM_THRESHOLD, LIMIT))
    return all([mallopt(name, value) for name, value in settings])


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
