"""The blocks of the README and the documents: what a reader types, and what is shown as the answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "lpa_model" / "README.md", *sorted((ROOT / "server" / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)(?: not run: ([^\n]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Fenced text of a document."""

    language: str
    not_run: str  # the reason, or ""
    text: str


class Command(NamedTuple):
    """A shell command, and the answer that the document shows, "" if none."""

    text: str
    shown: str


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[Block]:
    """All of a document's; a fence of another form is an error."""
    text = path.read_text(encoding="utf-8")
    found = [Block(*found.groups("")) for found in BLOCK.finditer(text)]
    assert 2 * len(found) == len(re.findall("^```", text, re.MULTILINE)), f"{name(path)} has a fence of another form"
    return found


def commands(block: Block) -> list[Command]:
    """Those of a block: all of it, `$ ` and what follows up to the answer, or a program for Python."""
    if block.language == "sh":
        return [Command(block.text, "")]
    if block.language == "python":
        return [Command(f"python - <<'END OF PROGRAM'\n{block.text}END OF PROGRAM\n", "")]
    assert block.language == "console"
    return list(_prompts(block.text))


def _prompts(text: str) -> Iterator[Command]:
    assert text.startswith("$ ")
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        end = 1
        # a command goes on after a backslash, and within quotes
        while lines[end - 1].endswith("\\\n") or "".join(lines[:end]).count("'") % 2:
            end += 1
        yield Command("".join(lines[:end]), "".join(lines[end:]))
