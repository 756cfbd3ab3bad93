"""Requests that are not running. No tensors.

Lists are sorted by `Request.order` and searched by bisection: joining and leaving moves a few bytes for each request
behind, and no search or sort passes over the queue.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from server.engine.request import Request

by_order = attrgetter("order")


def insert(requests: list[Request], request: Request) -> None:
    """Into a list that is sorted by `order`."""
    insort(requests, request, key=by_order)


def remove(requests: list[Request], request: Request) -> None:
    """Out of a list that is sorted by `order`; the request must be in it."""
    at = bisect_left(requests, request.order, key=by_order)
    assert requests[at] is request
    del requests[at]


class WaitingQueue:
    """`ready` requests, best first, and those set aside until another request has computed what they share with it.

    The latter stand in that request's `followers` or `waiters`, so that nobody has to look at them in between.
    """

    def __init__(self) -> None:
        self.ready: list[Request] = []
        self._aside: dict[Request, dict[Request, int]] = {}  # in which dictionary each of them stands

    def __len__(self) -> int:
        return len(self.ready) + len(self._aside)

    def add(self, request: Request) -> None:
        """Queue a request where its order says."""
        insert(self.ready, request)

    def remove(self, request: Request) -> None:
        """Take out a request, wherever it waits."""
        if request in self._aside:
            del self._aside.pop(request)[request]
        else:
            remove(self.ready, request)

    def set_aside(self, request: Request, where: dict[Request, int], tokens: int) -> None:
        """Let a request, which is not in the queue, wait for the one whose `where` is to have computed `tokens`."""
        where[request] = tokens
        self._aside[request] = where

    def wake(self, where: dict[Request, int], computed: int | None = None) -> None:
        """Make ready who waits there for no more than `computed` tokens, or all."""
        for request in [request for request, tokens in where.items() if computed is None or tokens <= computed]:
            self.remove(request)
            self.add(request)
