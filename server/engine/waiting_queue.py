"""Requests that are not running. No tensors.

Lists are sorted by `Request.order` and searched by bisection: joining and leaving moves a few bytes for each request
behind, and no search or sort passes over the queue.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
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


class Turns:
    """Round robin over groups: the first request of a group gets the current turn, each further one the
    turn after. So a single request precedes the many of another group.

    With every request that runs the current turn moves on by its part of a round over the groups that are there, as
    the virtual time of fair queueing does. Otherwise single requests that keep coming would all get the same turn, and
    the second request of a group would wait for as long as they come.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._last: dict[str, float] = {}  # by group, the turn of its latest request
        self._count: Counter[str] = Counter()  # by group, its requests that have not finished

    def next(self, group: str, *, again: bool = False) -> float:
        """The turn of a group's next request, or of one that goes to the end of its group's line `again`."""
        turn = max(self._last.get(group, -1) + 1, self._now)
        self._last[group] = turn
        self._count[group] += not again
        return turn

    def has_run(self, turn: float) -> None:
        """A request of this turn has begun to run."""
        self._now = max(self._now + 1 / (len(self._count) + 1), turn)

    def leave(self, group: str) -> None:
        """A request of a group has finished."""
        self._count[group] -= 1
        if not self._count[group]:
            del self._count[group], self._last[group]


class WaitingQueue:
    """Requests that are `ready` to run, and those set aside until another one has computed what they share with it.

    The latter stand in that request's `followers` or `waiters`, so that no step scans them in between.
    """

    def __init__(self) -> None:
        self.ready: dict[bool, list[Request]] = {False: [], True: []}  # by is_scoring; best first
        self._aside: dict[Request, dict[Request, int]] = {}  # in which dictionary each of them stands

    def __len__(self) -> int:
        return sum(len(requests) for requests in self.ready.values()) + len(self._aside)

    @property
    def num_aside(self) -> int:
        return len(self._aside)

    def first(self, kinds: Iterable[bool]) -> Request | None:
        """The best of the ready requests of some kinds (values of `is_scoring`)."""
        heads = [self.ready[kind][0] for kind in kinds if self.ready[kind]]
        return min(heads, key=by_order, default=None)

    def add(self, request: Request) -> None:
        """Queue a request where its order says."""
        insert(self.ready[request.is_scoring], request)

    def remove(self, request: Request) -> None:
        """Take out a request, wherever it waits."""
        if request in self._aside:
            del self._aside.pop(request)[request]
        else:
            remove(self.ready[request.is_scoring], request)

    def set_aside(self, request: Request, where: dict[Request, int], tokens: int) -> None:
        """Let a request that is not queued wait until the request that owns `where` has computed so many tokens."""
        where[request] = tokens
        self._aside[request] = where

    def wake(self, where: dict[Request, int], computed: int | None = None) -> None:
        """Make ready the requests that wait there for no more than `computed` tokens, or all."""
        for request in [request for request, tokens in where.items() if computed is None or tokens <= computed]:
            self.remove(request)
            self.add(request)
