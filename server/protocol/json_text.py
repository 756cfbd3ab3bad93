"""JSON that is written while it is sent: an answer may have a million alternatives, and as dicts and lists they would
take ten times their text's memory, and hold everyone up while they are collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

WIDE = 2000  # alternatives of a token; more are written as they are sent
RUN = 1 << 9  # entries written at once, which takes about a millisecond


@dataclass(frozen=True)
class JsonText:
    """A value by the parts of its JSON; each call of `parts` begins anew."""

    parts: Callable[[], Iterator[str]]


def listed(opening: str, entries: Iterable[str], closing: str) -> Iterator[str]:
    """Entries with commas between them, RUN at a time."""
    remaining, before = iter(entries), opening
    while run := list(islice(remaining, RUN)):
        yield before + ",".join(run)
        before = ","
    yield closing if before == "," else opening + closing
