"""The C kernels' own tests with AddressSanitizer and UBSan, red zones around every buffer.

The compiler is the package's own; the sanitizers' runtime libraries are those of Debian's gcc.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lpa_model.backends.cpu.build import EMULATED, INSTRUCTION_SETS, LIBRARY, SANITIZED, build, objects_of
from lpa_model.backends.cpu.library import load

ROOT = Path(__file__).parent.parent.parent
TESTS = sorted(path for path in (ROOT / "tests").glob("test_cpu_*.py") if path.name != "test_cpu_library.py")
BROKEN = """
import torch
from lpa_model.backends.cpu.oplist import OpList
from lpa_model.backends.cpu.packing import pack
from tests.cpu_kernels import kernels_here
ops = OpList(kernels_here()["scalar"], torch.float32)
ops.gemm(torch.zeros(7, 32), pack(torch.zeros(50, 32)), torch.empty(7, 50))
ops._ops[0]["columns"] = 64
ops.run(7)
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of a process that loads libraries with sanitizers."""
    folder = objects_of(LIBRARY) / "sanitized"
    sets = [flavour for flavour in INSTRUCTION_SETS[platform.machine()] if load().supports(flavour.name)]
    build(folder / "kernels.so", instruction_sets=sets, flags=SANITIZED)
    build(folder / "emulated.so", instruction_sets=EMULATED, flags=SANITIZED)
    runtimes = [
        subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SANITIZED_KERNELS": str(folder),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@pytest.mark.parametrize("tests", TESTS, ids=lambda path: path.stem)
def test_kernels_under_sanitizers(environment: dict[str, str], tests: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_written_behind_a_buffer_is_found(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr
