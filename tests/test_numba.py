"""Machine code of the op list that numba compiles: kept, checked, and never loaded where it is not used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lpa_model.backends.cpu import numba
from lpa_model.backends.cpu.numba import launch

CACHED = """
import sys
from lpa_model.backends.cpu.numba.launch import _folder, compile_kernel
kernel = compile_kernel("lpa_model.backends.cpu.numba.norm.rms_norm_bfloat16").result()
assert kernel is not None
print("numba" in sys.modules, _folder())
"""


def test_what_is_compiled_at_installation_is_read(tmp_path: Path) -> None:
    """Without numba; what cannot be kept is compiled every time."""

    def compiled_in(folder: Path) -> tuple[bool, Path]:
        done = subprocess.run(
            [sys.executable, "-c", CACHED],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "NUMBA_CACHE_DIR": str(folder)},
        )
        assert done.returncode == 0, done.stderr
        compiled, where = done.stdout.split(maxsplit=1)
        return compiled == "True", Path(where.strip())

    compiled, folder = compiled_in(tmp_path / "cache")
    assert compiled and folder.parent == tmp_path / "cache"
    assert [file.name for file in folder.iterdir()] == ["lpa_model.backends.cpu.numba.norm.rms_norm_bfloat16"]
    assert compiled_in(tmp_path / "cache") == (False, folder)
    # a file where a folder should be is a place that root cannot write to either
    (tmp_path / "blocked").write_text("")
    assert compiled_in(tmp_path / "blocked")[0]


def test_machine_code_that_is_damaged_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "kernel"
    assert launch._kept(file) is None
    launch._keep(b"code", file)
    assert launch._kept(file) == b"code"
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:10], whole[:-1] + b"E", bytes(len(whole))):
        file.write_bytes(damaged)
        assert launch._kept(file) is None


def test_nothing_imports_numba_at_start() -> None:
    code = "import sys, server.cli, server.engine.engine; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(numba.__file__).parents[4])
