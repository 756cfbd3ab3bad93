"""Responses that are kept in memory, within limits: those that were unused for longest go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.protocol.responses import Item


@dataclass(frozen=True)
class Stored:
    """A response, and the items that it answers: those of its own request, after all that was before them."""

    response: dict[str, Any]
    history: Sequence[Item]
    own: int  # how many of the last ones are its own
    size: int  # bytes of JSON of everything

    @property
    def conversation(self) -> list[Item]:
        """What a next response has before it."""
        return [*self.history, *self.response["output"]]


class ResponseStore:
    """By id. Belongs to the event loop's thread."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count, self._max_bytes = max_count, max_bytes
        self._entries: OrderedDict[str, Stored] = OrderedDict()  # unused for longest first
        self._items: dict[str, Item] = {}  # of their outputs, by id
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def fits(self, size: int) -> bool:
        """Whether a response of so many bytes is kept."""
        return self._max_count > 0 and size <= self._max_bytes

    def put(self, response_id: str, stored: Stored) -> None:
        """Keep a response that fits."""
        assert self.fits(stored.size)
        self._entries[response_id] = stored
        self._items |= {item["id"]: item for item in stored.response["output"]}
        self.num_bytes += stored.size
        while len(self._entries) > self._max_count or self.num_bytes > self._max_bytes:
            self.remove(next(iter(self._entries)))

    def get(self, response_id: str) -> Stored | None:
        """A response, which counts as used."""
        if (found := self._entries.get(response_id)) is not None:
            self._entries.move_to_end(response_id)
        return found

    def remove(self, response_id: str) -> bool:
        """Whether it was there."""
        if (found := self._entries.pop(response_id, None)) is None:
            return False
        self.num_bytes -= found.size
        for item in found.response["output"]:
            del self._items[item["id"]]
        return True

    def item(self, item_id: str) -> Item | None:
        """An item of a response's output."""
        return self._items.get(item_id)
