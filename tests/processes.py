"""Processes beside the tests: a port for one, `lpa serve` in one of its own, and any command in one that is forked."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["server.serve", "lpa_model.train.loop", "torch._dynamo", "tests.faults"])


class Forked:
    """`lpa ARGUMENTS` as a process of its own, which is forked from one that has imported nearly everything: a start
    that takes none of the seconds of torch's import. What a command imports, and how a Python that ends by itself
    ends, is for tests of `lpa_serve` and of the documents.

    `folder` gets what it prints, `environment` is beside this process's, and `fault` is called before the command.
    """

    def __init__(
        self, folder: Path, *arguments: object, fault: Callable[[], None] | None = None, **environment: str
    ) -> None:
        self._files = [folder / f"{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr")]
        variables = {**os.environ, "LPA_DTYPE": "float32", "LPA_THREADS": "1", **environment}
        words = ["lpa", *map(str, arguments)]
        self._process = FORKS.Process(target=_run, args=(words, self._files, variables, fault))
        self._process.start()

    @property
    def out(self) -> str:
        return self._read(0)

    @property
    def err(self) -> str:
        return self._read(1)

    def _read(self, number: int) -> str:
        file = self._files[number]
        return file.read_text() if file.exists() else ""

    def printed(self, pattern: str) -> str:
        """Wait for a part of stdout; returns it."""
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(pattern, self.out)):
            assert self._process.is_alive(), self.err
            assert time.monotonic() < deadline, "it did not come"
            time.sleep(0.01)
        return found[0]

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, seconds: float = 600) -> int:
        """The status it ends with."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, "it did not end"
        return self._process.exitcode

    def wait_or_kill(self, seconds: float) -> int:
        """The status it ends with by itself in this time, or by SIGKILL after it."""
        self._process.join(seconds)
        self._process.kill()
        return self.wait()


@contextmanager
def forked(folder: Path, *arguments: object, **options: Any) -> Iterator[Forked]:
    """A `Forked` that is killed at the end if it still runs."""
    process = Forked(folder, *arguments, **options)
    try:
        yield process
    finally:
        process.wait_or_kill(0)


def _run(words: list[str], files: list[Path], environment: dict[str, str], fault: Callable[[], None] | None) -> None:
    for number, file in enumerate(files, start=1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = words
    if fault is not None:
        fault()
    from server.cli import main

    main()
