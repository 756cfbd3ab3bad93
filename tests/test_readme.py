"""What README and documents tell a reader to type, typed: in a shell for each document, from a folder like a fresh
clone after `make serve`, with nothing on the PATH that the document does not put there.

A block that cannot run here says why in its fence: ```sh not run: REASON.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.documents import DOCUMENTS, ROOT, Block, Command, blocks, commands, name
from tests.processes import free_port

RUN = ("sh", "console", "python")
SERVES = re.compile(r"^(?:\w+=\S* )*(?:make|lpa) serve\b(?!.*--help)")
READY = re.compile(r"http://127\.0\.0\.1:(\d+)/")
LIMIT = 3600  # seconds; to end what hangs, on a loaded machine too
MARK = "\x1e"

NOT_RUN = {
    ("server/docs/api.md", "the server of the quickstart has no --data-dir"),
    ("README.md", "needs the address of your copy"),
    ("README.md", "needs docker"),
    ("server/docs/benchmarks.md", "needs a second server"),
    ("server/docs/benchmarks.md", "takes minutes"),
    ("server/docs/capacity.md", "takes minutes"),
    ("server/docs/contributing.md", "these run the tests that run this"),
    ("server/docs/conversion.md", "needs PyPI"),
    ("server/docs/kernels.md", "compiles for minutes"),
    ("server/docs/kernels.md", "needs a GPU"),
    ("server/docs/kernels.md", "takes minutes"),
    ("server/docs/models.md", "needs checkpoints of other projects"),
    ("server/docs/models.md", "needs transformers"),
    ("server/docs/models.md", "writes gigabytes"),
    ("server/docs/models.md", "needs a checkpoint that the paper's code has trained"),
    ("server/docs/models.md", "needs PyPI"),
    ("server/docs/models.md", "needs the Hugging Face hub"),
    ("server/docs/models.md", "trains for minutes on a GPU"),
    ("server/docs/operations.md", "needs a cluster"),
    ("server/docs/operations.md", "needs docker"),
    ("server/docs/operations.md", "needs several machines"),
    ("server/docs/operations.md", "needs the extra ray"),
    ("server/docs/operations.md", "takes minutes"),
    ("server/docs/quickstart.md", "needs the address of your copy"),
    ("server/docs/scoring.md", "needs lm-evaluation-harness and its tasks from a hub"),
}


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


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """With the README's own `make serve` at work, which Ctrl+C ends."""
    found = Clone(tmp_path_factory.mktemp("clone"))
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


@pytest.fixture(scope="module")
def terminals(clone: Clone) -> Iterator[dict[Path, Future[subprocess.CompletedProcess[str]]]]:
    """All documents, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(clone.run, script(clone, parts)) for path, parts in TYPED.items()}


@pytest.mark.parametrize("path", TYPED, ids=name)
def test_what_is_typed_works(path: Path, terminals: dict[Path, Future[subprocess.CompletedProcess[str]]]) -> None:
    parts, done = TYPED[path], terminals[path].result()
    outputs = done.stdout.split(MARK)[1:]
    assert done.returncode == 0, f"{parts[len(outputs) - 1].text}\n{outputs[-1:]}\n{done.stderr}"
    for part, output in zip(parts, outputs, strict=True):
        if not part.shown:
            assert '"error":' not in output, part.text
        elif part.shown.startswith("{"):
            assert not shape_problem(json.loads(part.shown), json.loads(output)), (part.text, output)
        else:
            assert output.strip(), part.text


def test_blocks_that_are_not_run_are_these() -> None:
    assert {(name(path), block.not_run) for path in DOCUMENTS for block in blocks(path) if block.not_run} == NOT_RUN


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_nothing_to_type_is_in_a_block_of_another_kind(path: Path) -> None:
    for block in blocks(path):
        if block.language not in RUN:
            assert block.language == "text"
            assert not re.search(r"^(\$ |lpa |make |curl |docker |pip |source )", block.text, re.MULTILINE), block.text


def test_the_readme_is_short_and_its_pictures_are_small() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    pictures = {*re.findall(r'(?:src|srcset)="([^"]+)"', text), *re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)}
    assert len(pictures) == 3
    assert sum((ROOT / picture).stat().st_size for picture in pictures) < 150_000


def test_links_between_documents_have_targets() -> None:
    from server.routes.pages import anchor

    for path in DOCUMENTS:
        for target, fragment in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
            file = path if not target else path.parent / target
            if (path.parent.name, target) == ("docs", "reference"):  # a page that has no file
                continue
            assert file.is_file(), f"{name(path)}: {target}"
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if fragment else []
            assert not fragment or fragment in map(anchor, headings), f"{name(path)}: {target}#{fragment}"


def test_an_answer_that_lacks_something_is_found() -> None:
    shown = {"a": [{"b": 1, "c": None}], "d": "x"}
    assert shape_problem(shown, {"a": [{"b": 2.5, "c": None, "e": 0}], "d": "y", "f": 0}) == ""
    assert shape_problem(shown, {"a": [{"b": 2, "c": None}]}) == "answer has no d"
    assert shape_problem(shown, {"a": [{"c": None}], "d": ""}) == "answer.a[0] has no b"
    assert shape_problem(shown, {"a": [], "d": ""}) == "answer.a is empty"
    assert shape_problem(shown, {"a": [{"b": "1", "c": None}], "d": ""}) == "answer.a[0].b is '1'"
    two = Block("console", "", "$ echo a \\\n  b\na b\n$ echo 'c\nd'\n")
    assert commands(two) == [Command("echo a \\\n  b\n", "a b\n"), Command("echo 'c\nd'\n", "")]
