"""The package as a wheel: complete, with the embedded model in it, and at work outside the source tree."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lpa_model.backends.cpu.build import LIBRARY, objects_of

ROOT = Path(__file__).parent.parent


def build_wheel(folder: Path, *options: str) -> Path:
    """Built from a copy, so that nothing left in build/ gets into it, and without a network.

    Time limits are there to end what hangs: compiling takes minutes on a busy machine.
    """
    source, target = folder / "source", folder / "wheel"
    source.mkdir()
    for name in ("lpa_model", "server", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", LIBRARY.name))
    objects = objects_of(LIBRARY)
    if objects.exists():  # the kernels are linked again, and compiled again only where they have changed
        shutil.copytree(objects, source / objects.relative_to(ROOT))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", target]
    done = subprocess.run([*command, *options, source], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = target.glob("lpa_server-*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = build_wheel(tmp_path_factory.mktemp("native"))
    assert path.name.endswith(f"-py3-none-manylinux_2_28_{platform.machine()}.whl")
    return path


def test_wheel_holds_both_packages_and_the_embedded_model(wheel: Path) -> None:
    expected = {
        str(path.relative_to(ROOT))
        for package, patterns in {
            "lpa_model": (
                *("*.py", "py.typed", "README.md", "checkpoints/**/*", "backends/cpu/csrc/*"),
                "convert/lowrank/*.txt",
            ),
            "server": ("*.py", "py.typed", "docs/*.md", "playground/**/*", "routes/*.html", "routes/*.json"),
        }.items()
        for pattern in patterns
        for path in (ROOT / package).rglob(pattern)
        if path.is_file()
    }
    embedded = {
        f"lpa_model/checkpoints/lpa-tiny/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")
    }
    assert embedded <= expected
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        [metadata] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        [entry_points] = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
        assert names == expected | {str(LIBRARY.relative_to(ROOT))}  # all of it, and neither tests nor caches
        assert "Requires-Dist: torch==2.13.0" in archive.read(metadata).decode()
        assert "lpa = server.cli:main" in archive.read(entry_points).decode()


def test_installed_wheel_generates_with_the_embedded_model(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        site,
        wheel,
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=900)
    code = (
        "import sys, server.cli, lpa_model;"
        "from lpa_model.backends.cpu.library import load; assert load().supported();"
        f"assert lpa_model.__file__.startswith({str(site)!r}), lpa_model.__file__;"
        "sys.argv = ['lpa', 'generate', 'Once upon a time', '--max-tokens', '8', '--temperature', '0'];"
        "server.cli.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "LPA_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= 3
