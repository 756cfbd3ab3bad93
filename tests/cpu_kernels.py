"""What the tests of the C kernels share: every instruction set that runs here, and memory that ends where it ends."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lpa_model.backends.cpu.build import EMULATED, FLAGS, LIBRARY, build, objects_of
from lpa_model.backends.cpu.library import Kernel, Library, load

DTYPES = (torch.float32, torch.bfloat16)
PAGE = mmap.PAGESIZE
# a folder with libraries under sanitizers: set by extra/test_kernel_sanitizers.py for the tests that it runs
SANITIZED = Path(os.environ["SANITIZED_KERNELS"]) if "SANITIZED_KERNELS" in os.environ else None
# in the place of immintrin.h: to read all of it takes the compiler longer than most of our files, and these need AVX2's
AVX2_ALONE = ["-D__IMMINTRIN_H"]
for part in ("mm", "xmm", "emm", "pmm", "tmm", "smm", "avx", "avx2"):
    AVX2_ALONE += ["-include", f"{part}intrin.h"]
_libc = ctypes.CDLL(None, use_errno=True)


@cache
def _library() -> Library:
    return Library(SANITIZED / "kernels.so") if SANITIZED else load()


@cache
def kernels_here() -> Mapping[str, Mapping[str, Kernel]]:
    """Instruction sets by name: those of this processor, and newer ones' control flow with emulated instructions."""
    found = {name: _library().kernels(name) for name in _library().supported()}
    newer = (
        SANITIZED / "emulated.so"
        if SANITIZED
        else build(objects_of(LIBRARY) / "emulated.so", instruction_sets=EMULATED, flags=[*FLAGS, *AVX2_ALONE])
    )
    emulated = Library(newer)
    for flavour in EMULATED:
        found[f"{flavour.name}, emulated"] = emulated.kernels(flavour.name)
    return found


# by the files that have code of their own: what is emulated has none where it is shared, see build.py
ROW_NAMES = _library().supported()
ATTENTION_NAMES = (
    *ROW_NAMES,
    *(f"{flavour.name}, emulated" for flavour in EMULATED if "attention_decode.c" not in flavour.shared),
)
GEMM_NAMES = (*ROW_NAMES, *(f"{flavour.name}, emulated" for flavour in EMULATED))


def guarded(tensor: Tensor) -> Tensor:
    """A copy whose last number is the last of a page of memory, with nothing behind it that may be read or written."""
    if SANITIZED:
        return tensor.contiguous().clone()  # between red zones
    size = tensor.numel() * tensor.itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    buffer = np.frombuffer(memory, dtype=np.uint8)
    assert _libc.mprotect(ctypes.c_void_p(buffer.ctypes.data + pages * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    at = pages * PAGE - size
    copy = torch.from_numpy(buffer[at : at + size]).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def rows_of(values: Tensor, spare: int) -> Tensor:
    """The same rows, `spare` numbers apart that are NaN, with NaN in front and nothing behind the last one."""
    rows, width = values.shape
    memory = torch.full((rows * (width + spare),), torch.nan, dtype=values.dtype)
    memory = guarded(memory[spare:])
    view = memory.as_strided((rows, width), (width + spare, 1))
    return view.copy_(values)


def float64(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return tensor.double().numpy()


def error_of(dtype: torch.dtype) -> float:
    """Of one rounding to a dtype, relative."""
    return float(torch.finfo(dtype).eps) / 2
