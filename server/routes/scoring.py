"""Sequences whose tokens are scored, or whose hidden states are wanted: many for one HTTP request, a bounded number at
a time, results in order."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from contextlib import aclosing
from typing import Any, TypeVar

from server.engine.async_engine import AsyncEngine
from server.engine.hidden_states import Floats, HiddenSpec
from server.engine.request import (
    NO_MORE,
    Logprobs,
    Measures,
    Request,
    RequestOutput,
    hidden_request,
    scoring_request,
)
from server.errors import TimedOut, UserError
from server.settings import Settings

A = TypeVar("A")
T = TypeVar("T")

MAX_ENTRIES = 1 << 21  # numbers in the scores of one HTTP request that are in flight, where they are many
SLICE = 0.003  # seconds of the event loop at a time


class Scorer:
    """Scores the sequences of one HTTP request, whose first may be refused; later ones wait for a full queue.

    At most `max_in_flight` are with the engine: as many again as run at once, so that it need not wait for the event
    loop between steps.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        settings: Settings,
        request_id: str,
        *,
        entries: int = 0,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        """`entries`: about the numbers in a sequence's scores; of sequences with many, fewer are in flight."""
        self._engine = engine
        self._unique = f"{request_id}-{secrets.token_hex(4)}"  # clients may send an x-request-id twice
        self._session = engine.session()
        self._count = 0
        self.max_in_flight = engine.max_num_seqs + min(engine.max_num_seqs, settings.max_queue)
        self.max_model_len = engine.max_model_len
        if entries:
            self.max_in_flight = min(self.max_in_flight, max(2, MAX_ENTRIES // entries))
        self._priority, self._cache_salt = priority, cache_salt
        self._slots = asyncio.Semaphore(self.max_in_flight)

    async def score(
        self, token_ids: list[int], first: int, measures: Measures = NO_MORE, branches: tuple[int, ...] = ()
    ) -> tuple[Logprobs, int]:
        """What `scoring_request` asks for: the scores, and how many tokens came from the prefix cache.

        Raises:
            UserError: as `AsyncEngine.generate`.
        """
        async with self._slots:
            request = scoring_request(
                self._id(),
                token_ids,
                first,
                measures,
                branches,
                self._unique,
                priority=self._priority,
                cache_salt=self._cache_salt,
            )
            output = await self._run(request)
            assert output.prompt_logprobs is not None and len(output.prompt_logprobs.logprobs) == len(token_ids) - first
            return output.prompt_logprobs, output.num_cached_tokens

    async def hidden_states(self, token_ids: list[int], spec: HiddenSpec) -> Floats:
        """As `HiddenStates.result`; raises what `score` raises."""
        async with self._slots:
            output = await self._run(hidden_request(self._id(), token_ids, spec, self._unique))
            assert output.hidden is not None
            return output.hidden

    def _id(self) -> str:
        self._count += 1
        return f"{self._unique}-{self._count}"

    async def in_order(
        self, jobs: AsyncGenerator[Coroutine[Any, Any, T]], deadline: float | None, most: int | None = None
    ) -> AsyncGenerator[T]:
        """`in_order` for jobs that score with this scorer, at most `most` at once; a drain waits for all of them."""
        limit = self.max_in_flight if most is None else min(most, self.max_in_flight)
        with self._session:
            async with aclosing(in_order(jobs, limit, deadline)) as results:
                async for result in results:
                    yield result

    async def _run(self, request: Request) -> RequestOutput:
        """Its only output."""
        async with aclosing(self._engine.generate([request], session=self._session)) as outputs:
            async for _, output in outputs:
                return output
        raise AssertionError("a sequence ended without an output")


async def made_of(batches: AsyncGenerator[Iterable[A]], make: Callable[[A], T]) -> AsyncGenerator[T]:
    """What `make` returns for each item, a batch at a time beside the event loop.

    A UserError, which taking an item from its batch may raise, too, comes after what was made before it.
    """

    def of_batch(batch: Iterable[A]) -> Iterator[T | UserError]:
        try:
            for item in batch:
                yield make(item)
        except UserError as error:
            yield error

    async with aclosing(batches):
        async for batch in batches:
            for found in await asyncio.to_thread(list, of_batch(batch)):
                if isinstance(found, UserError):
                    raise found
                yield found


async def in_order(
    jobs: AsyncGenerator[Coroutine[Any, Any, T]], max_in_flight: int, deadline: float | None
) -> AsyncGenerator[T]:
    """Results of `jobs` in their order. At most `max_in_flight` of them run, or are done but not yet taken.

    When one fails, the results before it come first; then its error is raised, and those after it are cancelled.
    The same when `jobs` itself raises.

    Args:
        deadline: when to raise TimedOut, on the event loop's clock.

    Raises:
        TimedOut: the deadline has passed.
    """
    started: asyncio.Queue[asyncio.Task[T] | Exception | None] = asyncio.Queue()
    slots = asyncio.Semaphore(max_in_flight)

    async def start_all() -> None:
        end: Exception | None = None
        try:
            async with aclosing(jobs):
                await slots.acquire()
                async for job in jobs:
                    started.put_nowait(asyncio.create_task(job))
                    await slots.acquire()
        except Exception as error:
            end = error
        started.put_nowait(end)

    loop = asyncio.get_running_loop()
    until = loop.time() + SLICE
    starting = asyncio.create_task(start_all())
    item: asyncio.Task[T] | Exception | None = None
    try:
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await started.get()
                    if not isinstance(item, asyncio.Task):
                        break
                    result = await item
            except TimeoutError:
                raise TimedOut("the request took longer than this server's request_timeout") from None
            slots.release()
            yield result
            if loop.time() > until:  # finished results never suspend this coroutine
                await asyncio.sleep(0)
                until = loop.time() + SLICE
        if item is not None:
            raise item
    finally:
        left = [item, *(started.get_nowait() for _ in range(started.qsize()))]
        tasks = [task for task in left if isinstance(task, asyncio.Task)]
        for task in (starting, *tasks):  # before anything is awaited: the client may leave meanwhile
            task.cancel()
        await asyncio.gather(starting, *tasks, return_exceptions=True)
