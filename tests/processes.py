"""Processes beside the tests: a port for one, and `lpa serve` in one of its own."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.documents import ROOT

URL = re.compile(r"(http://127\.0\.0\.1:\d+)/")
START_SECONDS = 600  # to end what hangs


def free_port() -> int:
    """A port that no program has; another one may take it meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def lpa_serve(
    log: Path, *arguments: object, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`lpa serve` on a free port: its URL, and its process, which is killed at the end if it still runs.

    `log` is the file that it prints to, `environment` what it has in place of this process's.
    """
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", *map(str, arguments)]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (found := URL.search(log.read_text())):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)
        yield found[1], process
    finally:
        process.kill()
        process.wait()
