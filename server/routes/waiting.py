"""Comments in a stream of events whose first one is still to come: proxies and clients see that the request lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")

COMMENT = ": waiting"


async def with_comments(events: AsyncGenerator[T], seconds: float) -> AsyncGenerator[T | str]:
    """`events`, with COMMENT every `seconds` until the first has come. An error before that comes as it is."""
    async with aclosing(events):
        first = asyncio.ensure_future(anext(events))
        try:
            while not (await asyncio.wait((first,), timeout=seconds))[0]:
                yield COMMENT
            yield first.result()
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        async for event in events:
            yield event
