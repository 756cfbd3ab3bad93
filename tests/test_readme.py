"""The README's commands, run as they stand: `sh` blocks by a shell, `python` blocks by Python, against `lpa serve`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`lpa serve` on the embedded model and a free port; it must end with status 0 when it is asked to."""
    log = tmp_path_factory.mktemp("serve") / "stdout"
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0"]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file)
    try:
        for _ in range(600):
            if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
                break
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)
        assert found, "the server did not start within a minute"
        yield found[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(BLOCKS)])
def test_block(language: str, code: str, url: str) -> None:
    code = code.replace("http://127.0.0.1:8000", url)
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "sh" else [sys.executable, "-c", code]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert '"error"' not in done.stdout


def test_there_is_documentation(url: str) -> None:
    with urllib.request.urlopen(f"{url}/docs") as answer:
        assert b"LPA inference server" in answer.read()
