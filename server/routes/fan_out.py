"""The sequences of one HTTP request: a few at a time on the engine, ended together."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from server.engine.async_engine import AsyncEngine
from server.engine.request import RequestOutput, SamplingParams
from server.errors import TimedOut
from server.settings import Settings

BUFFER = 64  # outputs that may wait for a slow reader; beyond them the sequences' own queues hold the rest


@dataclass(frozen=True)
class Job:
    """One sequence for the engine."""

    prompt_ids: list[int]
    params: SamplingParams
    choice: int = 0


def deadline_of(settings: Settings) -> float | None:
    """When a request that comes now is to be given up, on the event loop's clock; None: never."""
    timeout = settings.request_timeout
    return None if timeout is None else asyncio.get_running_loop().time() + timeout


async def run_jobs(
    engine: AsyncEngine, request_id: str, jobs: Sequence[Job], deadline: float | None
) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """(index of the job, output) as they come. At most `engine.max_num_seqs` jobs are with the engine at a time, so
    that a long list does not overflow the queue. When one fails, or the generator is closed, the others are aborted.

    Args:
        deadline: when to give up, on the event loop's clock.

    Raises:
        TimedOut: the deadline has passed.
        UserError: as `AsyncEngine.generate`.
    """
    outputs: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue(BUFFER)
    remaining = iter(enumerate(jobs))
    unique = f"{request_id}-{secrets.token_hex(4)}"  # clients may send an x-request-id twice

    async def work() -> None:
        for index, job in remaining:
            sequence = engine.generate(f"{unique}-{index}", job.prompt_ids, job.params, choice=job.choice)
            async with aclosing(sequence):
                async for output in sequence:
                    await outputs.put((index, output))

    async def work_all() -> None:
        end: Exception | None = None
        try:
            async with asyncio.timeout_at(deadline), asyncio.TaskGroup() as group:
                for _ in range(min(len(jobs), engine.max_num_seqs)):
                    group.create_task(work())
        except TimeoutError:
            end = TimedOut("the request took longer than this server's request_timeout")
        except ExceptionGroup as failed:
            end = failed.exceptions[0]
        await outputs.put(end)

    working = asyncio.create_task(work_all())
    try:
        while isinstance(item := await outputs.get(), tuple):
            yield item
        if item is not None:
            raise item
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
