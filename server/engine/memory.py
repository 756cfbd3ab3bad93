"""What the process does with memory that it does not need at the moment."""

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


def give_back_code() -> int:
    """Let go of the libraries' code, most of which only the start has needed: what is called comes back page by page.

    It is read from files, and stays in the system's cache as long as there is room. Returns the bytes of its mappings;
    none where the system does not tell them.
    """
    if not SMAPS.exists():
        return 0
    libc, total = ctypes.CDLL(None), 0
    for start, end, dirty in CODE.findall(SMAPS.read_text()):
        size = int(end, 16) - int(start, 16)
        if dirty == "0" and not libc.madvise(ctypes.c_void_p(int(start, 16)), ctypes.c_size_t(size), MADV_DONTNEED):
            total += size
    return total
