"""Memory that is given back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import re
import torch
from server.engine.memory import SMAPS, release_code

def mapped():
    with open("/proc/self/status") as status:
        return int(re.search(r"RssFile:\\s+(\\d+)", status.read())[1]) << 10

x = torch.randn(64, 64)
expected = x @ x
before = mapped()
total = release_code()
assert total > 0, "no mapping was found"
freed = before - mapped()
assert torch.equal(x @ x, expected)
print(freed)
"""


def test_code_that_is_given_back_comes_back_when_it_is_called() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20 << 20  # bytes; torch alone maps twice as much
