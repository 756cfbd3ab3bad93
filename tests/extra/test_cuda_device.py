"""The kernels in Triton's interpreter, as `lpa bench device` compares them with their twins on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_kernels_equal_their_twins(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "server.cli", "bench", "device", "--device", "cpu", "--part", "operations"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([*command, "--out", out], env=environment, check=True, timeout=600)
    found = json.loads(out.read_text())["operations"]
    assert found["ok"] and found["compared"].startswith("kernels with twins")
    assert max(max(row["worst"].values()) for row in found["rows"]) > 0
