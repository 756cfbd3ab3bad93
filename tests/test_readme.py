"""What README and documents tell a reader to type, typed: in a shell for each document, from a folder like a fresh
clone after `make serve`, with nothing on the PATH that the document does not put there.

A block that cannot run here says why in its fence: ```sh not run: REASON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import DOCUMENTS, ROOT, Block, Command, blocks, commands, name
from tests.terminal import RUN, TYPED, Terminals, check, shape_problem, walked

DOCS = ROOT / "server" / "docs"
API = DOCS / "api.md"
# typed by extra/test_readme.py: fifty commands that train, convert, quantise, score, measure and serve, each for
# seconds of a processor; test_train_cli.py, test_convert_*.py, test_export*.py, test_lowrank.py, test_quantize.py,
# test_score*.py, test_compare.py, test_bench*.py, test_batches.py, test_cuda_backend.py and test_processes.py walk the
# same code
HEAVY = {
    DOCS / f"{name}.md": TYPED[DOCS / f"{name}.md"]
    for name in ("api", "benchmarks", "contributing", "conversion", "kernels", "models", "operations", "scoring")
}
QUICK = {path: parts for path, parts in TYPED.items() if path not in HEAVY}
QUICK[API] = [part for part in TYPED[API] if part.text.startswith("curl ")]

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


@pytest.fixture(scope="module")
def terminals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminals]:
    with walked(tmp_path_factory.mktemp("clone"), QUICK) as found:
        yield found


@pytest.mark.parametrize("path", QUICK, ids=name)
def test_what_is_typed_works(path: Path, terminals: Terminals) -> None:
    check(QUICK[path], terminals[path].result())


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
