"""How many values a JSON text has, without reading it: their number, more than its bytes, is what reading takes."""

from __future__ import annotations

import re

from server.errors import InvalidRequest

CONTAINER = 4  # values that an object or list counts as
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def check_num_values(text: bytes, limit: int, where: str) -> None:
    """Raises InvalidRequest for a JSON text of more values and names than `limit`, where an object or a list counts as
    CONTAINER. What looks like JSON inside its strings is passed over only where that matters."""
    if _count(text, 0, len(text)) <= limit:
        return
    found = at = 0
    for string in STRING.finditer(text):
        found += _count(text, at, string.start())
        at = string.end()
        if found > limit:
            break
    if found + _count(text, at, len(text)) > limit:
        raise InvalidRequest(
            f"{where} has more than {limit} values (an object or a list counts as {CONTAINER}), which is the server's "
            "max_body_values; send less at a time"
        )


def _count(text: bytes, start: int, end: int) -> int:
    containers = text.count(b"[", start, end) + text.count(b"{", start, end)
    return text.count(b",", start, end) + text.count(b":", start, end) + CONTAINER * containers
