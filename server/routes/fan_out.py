"""The sequences of one HTTP request on the engine."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass

from server.engine.async_engine import AsyncEngine
from server.engine.request import Request, RequestOutput, SamplingParams
from server.settings import Settings


@dataclass(frozen=True)
class Job:
    """One sequence for the engine. Choices above 0 stand behind choice 0 of the same prompt and share its run."""

    prompt_ids: list[int]
    params: SamplingParams
    choice: int = 0
    priority: int = 0
    cache_salt: str = ""


def deadline_of(settings: Settings) -> float | None:
    """When a request that comes now is to be given up, on the event loop's clock; None: never."""
    timeout = settings.request_timeout
    return None if timeout is None else asyncio.get_running_loop().time() + timeout


def run_jobs(
    engine: AsyncEngine, request_id: str, jobs: Iterable[Job], deadline: float | None
) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """(index of the job, output) as they come, as `AsyncEngine.generate`; `jobs` is read as they can run."""
    return engine.generate(_requests(request_id, jobs), deadline)


def _requests(request_id: str, jobs: Iterable[Job]) -> Iterator[Request]:
    unique = f"{request_id}-{secrets.token_hex(4)}"  # clients may send an x-request-id twice
    leader: Request | None = None
    for index, job in enumerate(jobs):
        request = Request(
            f"{unique}-{index}",
            job.prompt_ids,
            job.params,
            choice=job.choice,
            priority=job.priority,
            cache_salt=job.cache_salt,
            leader=leader if job.choice else None,
            group=unique,
        )
        if not job.choice:
            leader = request
        yield request
