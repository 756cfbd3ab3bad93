"""What a model says of itself: the first paragraph of its folder's README.md."""

from __future__ import annotations

import re
from pathlib import Path

CARD = "README.md"
LONGEST = 300  # characters of a description; a longer one ends at a sentence or a word
MOST_READ = 1 << 16  # characters of the card

_FRONT_MATTER = re.compile(r"\A---\n.*?^---\n", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_NO_PROSE = re.compile(r"[#|<!\[>`~=]|[*+-]\s|---|\d+\.|\s{4}")  # headings, tables, HTML, images, quotes, lists, code
_MARKS = str.maketrans("", "", "*`")  # of emphasis and code
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def description(folder: Path) -> str | None:
    """The card's first paragraph of prose as plain text, at most 300 characters; None where there is none."""
    try:
        with (folder / CARD).open(encoding="utf-8") as file:
            card = file.read(MOST_READ).removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError):
        return None
    card = _COMMENT.sub("", _FRONT_MATTER.sub("", card))
    for paragraph in re.split(r"\n\s*\n", card):
        text = paragraph.strip("\n")
        if text.strip() and not _NO_PROSE.match(text):
            return _shortened(" ".join(_LINK.sub(r"\1", text).translate(_MARKS).split()))
    return None


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    sentences, _, _ = text[:LONGEST].rpartition(". ")
    return f"{sentences}." if sentences else f"{text[: LONGEST - 2].rpartition(' ')[0]} …"
