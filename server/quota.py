"""What one API key may use: requests per minute, and sequences at once. For the event loop's thread."""

from __future__ import annotations

import asyncio
import math
from time import monotonic

from server.errors import RateLimited, TimedOut


class RequestRate:
    """A bucket of `per_minute` requests, full at first and filled evenly."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._left = float(per_minute)
        self._at = monotonic()

    def _fill(self) -> None:
        now = monotonic()
        self._left = min(float(self.per_minute), self._left + (now - self._at) * self.per_minute / 60)
        self._at = now

    def take(self) -> None:
        """Count a request. Raises RateLimited if none is left."""
        self._fill()
        if self._left < 1:
            wait = (1 - self._left) * 60 / self.per_minute
            raise RateLimited(f"this key may make {self.per_minute} requests per minute", retry_after=wait)
        self._left -= 1

    def headers(self) -> dict[str, str]:
        """OpenAI's: the limit, what is left of it, and when all of it is there again."""
        self._fill()
        full = (self.per_minute - self._left) * 60 / self.per_minute
        return {
            "x-ratelimit-limit-requests": str(self.per_minute),
            "x-ratelimit-remaining-requests": str(math.floor(self._left)),
            "x-ratelimit-reset-requests": f"{full:.3f}s",
        }


class Sequences:
    """At most `limit` sequences with the engine at once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._places = asyncio.Semaphore(limit)

    @property
    def is_full(self) -> bool:
        return self._places.locked()

    async def take(self, *, may_wait: bool, deadline: float | None) -> None:
        """A place for a sequence, to be released.

        Args:
            may_wait: whether its request has begun, so that it waits for the others of its key.
            deadline: on the event loop's clock.

        Raises:
            RateLimited: there is none, and the request has not begun.
            TimedOut: the deadline has passed.
        """
        if self.is_full and not may_wait:
            raise RateLimited(f"this key may run {self.limit} sequences at once, and does", retry_after=1)
        try:
            async with asyncio.timeout_at(deadline):
                await self._places.acquire()
        except TimeoutError:
            raise TimedOut("the request took longer than this server's request_timeout") from None

    def release(self) -> None:
        """Give a place back."""
        self._places.release()
