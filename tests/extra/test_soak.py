"""The shortest soak: one thing of each kind at once."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path

from tests.soak import checks
from tests.soak.broken import BROKEN
from tests.soak.clients import KINDS, send_broken
from tests.soak.driver import Driver
from tests.soak.machine import ServerProcess


async def test_every_client_finds_a_healthy_server_without_fault(tmp_path: Path) -> None:
    """One thing of each kind at once, and every broken request."""
    server = ServerProcess(tmp_path, "auto")
    driver = Driver(server, KINDS, seed=0)
    try:
        await server.start()
        driver.server_is_up()
        start = await server.reading()
        async with driver.requests():
            await asyncio.gather(*(driver.do(kind, kind.name, random.Random(0)) for kind in KINDS))
            for broken in BROKEN:
                assert await send_broken(driver, broken) == "refused"
        assert driver.faults == [] and driver.hung == []
        assert len(driver.sampled) > 10
        idle = await checks.idle(server, "")
        assert idle.passed, idle.found
        for check in await checks.counts(driver, None, ""):
            assert check.passed, check.found

        async def no_task_is_left() -> bool:
            return (await server.reading()).tasks <= start.tasks

        assert await checks.until(no_task_is_left)
        assert await server.end(signal.SIGTERM, 60) == 0
        assert server.errors() == []
    finally:
        server.close()
