"""How many values a JSON text has, without reading it: their number, more than its bytes, is what reading takes."""

from __future__ import annotations

from server.errors import InvalidRequest

CONTAINER, NAME = 4, 8  # values that an object or list counts as, and the name of a field: a new text, to be hashed
QUOTE, BACKSLASH = b'"', ord("\\")


def check_num_values(text: bytes, limit: int, where: str) -> None:
    """Raises InvalidRequest for a JSON text that `has_more_values` than `limit`."""
    if has_more_values(text, limit):
        raise InvalidRequest(
            f"{where} has more than {limit} values (an object or a list counts as {CONTAINER}, a name as {NAME}), the "
            "server's max_body_values; send less at a time"
        )


def has_more_values(text: bytes, limit: int) -> bool:
    """Whether a JSON text has more values than `limit`, where an object or a list counts as CONTAINER and a name as
    NAME. What looks like JSON inside its strings is passed over only where that matters."""
    if _count(text, 0, len(text)) <= limit:
        return False
    found = at = 0
    while (start := text.find(QUOTE, at)) >= 0 and found <= limit:
        found += _count(text, at, start)
        at = _end_of_string(text, start + 1)
    return found + _count(text, at, len(text)) > limit


def _end_of_string(text: bytes, at: int) -> int:
    """The place after a string whose characters begin at `at`."""
    while (end := text.find(QUOTE, at)) >= 0:
        first = end
        while first > at and text[first - 1] == BACKSLASH:
            first -= 1
        if (end - first) % 2 == 0:
            return end + 1
        at = end + 1
    return len(text)


def _count(text: bytes, start: int, end: int) -> int:
    containers = text.count(b"[", start, end) + text.count(b"{", start, end)
    return text.count(b",", start, end) + NAME * text.count(b":", start, end) + CONTAINER * containers
