"""Memory that is given back."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from server.engine.memory import release_code


def mapped() -> int:
    """Bytes of files, of libraries above all, that this process has in memory."""
    found = re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def test_code_that_is_given_back_comes_back_when_it_is_called() -> None:
    x = torch.randn(64, 64)
    expected, before = x @ x, mapped()
    assert release_code() > 0, "no mapping was found"
    freed = before - mapped()
    assert torch.equal(x @ x, expected)
    assert freed > 20 << 20  # torch alone maps twice as much


HEAPS = """
import ctypes
import sys
import tempfile
import threading
from server.engine.memory import share_one_heap

if sys.argv[1] == "shared":
    share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.fopen.restype, libc.fopen.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_char_p]
libc.malloc_info.argtypes, libc.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
both = threading.Barrier(2)  # a heap is given on when its thread is gone, which may be long after it was joined

def allocate():
    libc.malloc(1000)
    both.wait()

threads = [threading.Thread(target=allocate) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with tempfile.NamedTemporaryFile() as file:
    stream = libc.fopen(file.name.encode(), b"w")
    assert libc.malloc_info(0, stream) == 0
    libc.fclose(stream)
    print(file.read().count(b"<heap nr="))
"""


@pytest.mark.parametrize(("heaps", "expected"), [("own", 3), ("shared", 1)])
def test_threads_share_one_heap(heaps: str, expected: int) -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", HEAPS, heaps], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == expected
