"""A shell for each document, in a folder like a fresh clone after `make serve`, with nothing on the PATH that the
document does not put there; what a reader is told to type is typed there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.documents import DOCUMENTS, ROOT, Command, blocks, commands
from tests.processes import free_port

RUN = ("sh", "console", "python")
SERVES = re.compile(r"^(?:\w+=\S* )*(?:make|lpa) serve\b(?!.*--help)")
READY = re.compile(r"http://127\.0\.0\.1:(\d+)/")
LIMIT = 3600  # seconds; to end what hangs, on a loaded machine too
MARK = "\x1e"


class Clone:
    """A folder like a clone that `make` has installed, and the environment of a new terminal in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for path in ROOT.iterdir():
            if not path.name.startswith(".") and path.suffix != ".egg-info":
                (folder / path.name).symlink_to(path)
        (folder / ".venv").mkdir()
        (folder / ".venv" / "bin").symlink_to(Path(sys.prefix) / "bin")
        (folder / ".venv" / "installed").touch()
        places = [p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != Path(sys.executable).parent]
        dropped = ("VIRTUAL_ENV", "PATH", "OPENAI_API_KEY")
        self.environment = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("LPA_")}
        self.environment |= {"PATH": os.pathsep.join(places), "COLUMNS": "100"}
        self.ports = {"8000": str(free_port()), "9000": str(free_port())}

    def typed(self, text: str) -> str:
        """With free ports in the place of those that another server may have."""
        return re.sub(r"\b(8000|9000)\b", lambda found: self.ports[found[1]], text)

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", script], cwd=self.folder, env=self.environment, text=True, capture_output=True, timeout=LIMIT
        )


@contextmanager
def served(folder: Path) -> Iterator[Clone]:
    """With the README's own `make serve` at work, which Ctrl+C ends."""
    found = Clone(folder)
    [block] = [block for block in blocks(ROOT / "README.md") if SERVES.match(block.text)]
    log = found.folder / "served"
    environment = found.environment | {"LPA_PORT": found.ports["8000"]}
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-c", block.text], cwd=found.folder, env=environment, stdout=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + LIMIT
        while not READY.search(log.read_text()):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)
        yield found
        os.killpg(process.pid, signal.SIGINT)
        process.wait(LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def script(clone: Clone, parts: list[Command]) -> str:
    """All commands of a document in one shell, the output of each after a mark; a server is ended once it is up."""
    lines = ["set -euo pipefail"]
    for part in parts:
        lines.append(f"printf '{MARK}'")
        if SERVES.match(part.text):
            lines += [
                f"served=$(mktemp -p .); bash -c {_quoted(clone.typed(part.text).strip())} > $served & pid=$!",
                "until grep -q ' is served' $served; do kill -0 $pid; sleep 0.1; done",
                "kill -TERM $pid; wait $pid; cat $served",
            ]
        else:
            lines.append(clone.typed(part.text))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def shape_problem(shown: Any, actual: Any, where: str = "answer") -> str:
    """Where an answer lacks what the document shows of it, "" if it lacks nothing; numbers and texts may differ."""
    if isinstance(shown, dict) and isinstance(actual, dict):
        if where.endswith("top_logprobs[0]"):  # tokens are its keys
            return ""
        for key, value in shown.items():
            if key not in actual:
                return f"{where} has no {key}"
            if problem := shape_problem(value, actual[key], f"{where}.{key}"):
                return problem
        return ""
    if isinstance(shown, list) and isinstance(actual, list):
        if shown and not actual:
            return f"{where} is empty"
        return shape_problem(shown[0], actual[0], f"{where}[0]") if shown else ""
    kinds = [float if type(value) is int else type(value) for value in (shown, actual)]
    return "" if kinds[0] is kinds[1] else f"{where} is {actual!r}"


def run_of(path: Path) -> list[Command]:
    found = [block for block in blocks(path) if block.language in RUN and not block.not_run]
    return [command for block in found for command in commands(block)]


TYPED = {
    path: [part for part in run_of(path) if not part.text.startswith("make serve")]  # it is running
    for path in DOCUMENTS
    if run_of(path)
}


Terminals = dict[Path, Future[subprocess.CompletedProcess[str]]]


@contextmanager
def walked(folder: Path, typed: Mapping[Path, list[Command]]) -> Iterator[Terminals]:
    """The shells of documents, two at a time, beside a server that `make serve` has started in `folder`."""
    with served(folder) as clone, ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(clone.run, script(clone, parts)) for path, parts in typed.items()}


def check(parts: list[Command], done: subprocess.CompletedProcess[str]) -> None:
    """Every command of a document has worked, and has answered in the form that is shown."""
    outputs = done.stdout.split(MARK)[1:]
    assert done.returncode == 0, f"{parts[len(outputs) - 1].text}\n{outputs[-1:]}\n{done.stderr}"
    for part, output in zip(parts, outputs, strict=True):
        if not part.shown:
            assert '"error":' not in output, part.text
        elif part.shown.startswith("{"):
            assert not shape_problem(json.loads(part.shown), json.loads(output)), (part.text, output)
        else:
            assert output.strip(), part.text
