"""Jobs whose results come in their order, and what becomes of them when they end early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import pytest

from server.routes.scoring import in_order


async def test_nothing_runs_on_when_a_client_leaves_while_a_failed_request_is_cleared_up() -> None:
    running, clearing_up = set[int](), asyncio.Event()

    async def job(number: int) -> int:
        if number == 0:
            await asyncio.sleep(0.01)
            raise ValueError("the first one fails")
        running.add(number)
        try:
            await asyncio.Event().wait()
        finally:
            running.discard(number)
        return number

    async def jobs() -> AsyncGenerator[Coroutine[Any, Any, int]]:
        try:
            for number in range(4):
                yield job(number)
            await asyncio.Event().wait()
        finally:
            clearing_up.set()
            await asyncio.sleep(0.01)  # as for a thread that tokenizes

    async def read() -> None:
        async for _ in in_order(jobs(), 8, None):
            raise AssertionError("no result was to come")

    before = asyncio.all_tasks()
    reading = asyncio.create_task(read())
    await clearing_up.wait()
    assert running <= {1, 2, 3}
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    for _ in range(3):
        await asyncio.sleep(0)
    assert not running
    assert asyncio.all_tasks() == before
