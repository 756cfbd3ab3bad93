"""What this processor and its devices can do, and how much memory is free: detected here and nowhere else."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from lpa_model.backends.cpu import library
from lpa_model.backends.cpu.build import LIBRARY

AMX, AVX512_BF16, NEON_BF16 = "amx", "avx512bf16", "neonbf16"


@cache
def instruction_sets() -> tuple[str, ...]:
    """Instruction sets of this processor that the C library has kernels for, the best first; none without a library.

    The variable LPA_CPU leaves the better ones out, down to the one that it names. With AMX among them, the process may
    use its tiles from here on.

    Raises:
        ValueError: this processor has not what LPA_CPU names.
    """
    found = library.load().supported() if LIBRARY.exists() else ()
    best = os.environ.get("LPA_CPU")
    if not best:
        return found
    if best not in found:
        raise ValueError(
            f"LPA_CPU: {best!r} is none of this processor's instruction sets ({', '.join(found) or 'none'})"
        )
    return found[found.index(best) :]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware (on a CPU: AVX512-BF16, AMX, or ARM's bf16 extension)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    return bool({AMX, AVX512_BF16, NEON_BF16} & set(instruction_sets()))


def has_triton() -> bool:
    """Whether kernels for a GPU can be compiled; Triton comes with torch's CUDA builds."""
    return find_spec("triton") is not None


def cuda_kernels() -> str:
    """What the variable LPA_CUDA says of the CUDA backend: "0", it is not taken (the default); "1", it is, on a GPU;
    "twins", it is on a CPU, too, with its kernels' twins in plain torch, to test it.

    Raises:
        ValueError: it is something else.
    """
    value = os.environ.get("LPA_CUDA") or "0"
    if value not in ("0", "1", "twins"):
        raise ValueError(f"LPA_CUDA: {value!r} is none of 0, 1, twins")
    return value


def resolve_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`; ValueError where torch finds no such device."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: {name!r} is none of cpu, cuda and cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        reason = (
            f"torch finds {count} GPUs" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        )
        raise ValueError(f"device: {name} is not there: {reason}")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` (bfloat16 where the device has it in hardware, else float32), `float32` or `bfloat16`."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now, within the container's limit where there is one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
        free = 4 << 30
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup") / name
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            free = min(free, int(text))
    return free
