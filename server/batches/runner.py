"""Works batches off, the oldest first: lines side by side in half of the sequences at most, so that other requests find
slots, each answer kept as it comes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from starlette.types import ASGIApp

from server.batches.execute import Answer, execute, unanswered
from server.batches.lines import MAX_ERRORS, Line, LineError, read_lines
from server.batches.store import Job, Status, Store
from server.metrics import Metrics
from server.settings import Settings

T = TypeVar("T")

logger = logging.getLogger(__name__)

READ = 64  # lines read together
POLL = 0.5  # seconds in which a cancelled or expired batch is noticed
RETRY = 5.0  # seconds


class Runner:
    """The store's thread, and the task that works its jobs off."""

    def __init__(self, store: Store, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._app = app
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, "batches")
        self._reading = ThreadPoolExecutor(1, "batch-lines")
        self._queued = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def call(self, method: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """A method of the store, in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(method, *arguments, **options))

    @property
    def store(self) -> Store:
        """For `call` alone."""
        return self._store

    def start(self) -> None:
        """Go on with what an earlier process has left."""
        self._task = asyncio.create_task(self._run())

    def wake(self) -> None:
        """A batch was added."""
        self._queued.set()

    async def stop(self) -> None:
        """End at once: lines that run are run again after the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.call(self._store.close)
        self._thread.shutdown(wait=False)
        self._reading.shutdown(wait=False)

    async def _run(self) -> None:
        while True:
            try:
                await self._next()
            except Exception:  # of the store: the disk may be full
                logger.exception("batches stand still; the next try is in %g seconds", RETRY)
                await asyncio.sleep(RETRY)

    async def _next(self) -> None:
        """The oldest job, or else wait for one."""
        self._queued.clear()
        job = await self.call(self._store.next_job)
        if job is None:
            await self._queued.wait()
            return
        try:
            await self._work(job)
        except Exception as error:
            logger.exception("batch %s failed", job.id)
            await self._fail(job, [LineError("server_error", f"{type(error).__name__}: {error}", None)])

    async def _work(self, job: Job) -> None:
        status = job.status
        if status == "validating":
            loop = asyncio.get_running_loop()
            total, errors = await loop.run_in_executor(self._reading, check_file, self._lines(job), self._settings)
            if errors:
                return await self._fail(job, errors)
            status = await self.call(self._store.status, job.id)
            if status == "validating":
                await self.call(self._store.set_status, job.id, "in_progress", total=total)
                status = "in_progress"
        end: Status = "completed" if status == "finalizing" else "cancelled"
        if status == "in_progress":
            end = await self._run_lines(job)
            if end == "completed":
                await self.call(self._store.set_status, job.id, "finalizing")
        await self.call(self._store.finish, job, end)
        logger.info("batch %s is %s", job.id, end)

    async def _fail(self, job: Job, errors: list[LineError]) -> None:
        document = {"object": "list", "data": [error.document() for error in errors]}
        await self.call(self._store.set_status, job.id, "failed", errors=document)

    def _lines(self, job: Job) -> Iterator[Line | LineError]:
        settings = self._settings
        path = self._store.path(job.input_file_id)
        return read_lines(path, job.endpoint, settings.max_body_bytes, settings.max_body_values)

    async def _unanswered(self, job: Job) -> Iterator[Line]:
        done = await self.call(self._store.finished_lines, job.id)
        return (line for line in self._lines(job) if isinstance(line, Line) and line.number not in done)

    async def _run_lines(self, job: Job) -> Status:
        """The status in which the lines end: completed, cancelled or expired."""
        answers = answer_all(
            self._app, await self._unanswered(job), self._reading, max(1, self._settings.max_num_seqs // 2)
        )
        working = asyncio.create_task(self._keep(job, answers))
        try:
            while not working.done():
                await asyncio.wait((working,), timeout=POLL)
                if await self.call(self._store.status, job.id) == "cancelling":
                    return "cancelled"
                if time.time() >= job.expires_at and not working.done():
                    break
            else:
                working.result()
                return "completed"
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await answers.aclose()
        await self._expire(job)
        return "expired"

    async def _keep(self, job: Job, answers: AsyncGenerator[list[tuple[Line, Answer]]]) -> None:
        async for found in answers:
            await self._add(job, [(line.number, answer) for line, answer in found])

    async def _add(self, job: Job, answers: list[tuple[int, Answer]]) -> None:
        self._metrics.count_batch_lines(*await self.call(self._store.add_answers, job.id, answers))

    async def _expire(self, job: Job) -> None:
        left = await self._unanswered(job)
        text = "This request could not be executed before the completion window expired."
        while some := await _next_lines(left, self._reading):
            await self._add(job, [(line.number, unanswered(line.custom_id, "batch_expired", text)) for line in some])


async def _next_lines(lines: Iterator[Line], reading: ThreadPoolExecutor) -> list[Line]:
    """Up to READ of them; none at their end."""
    return await asyncio.get_running_loop().run_in_executor(reading, lambda: list(itertools.islice(lines, READ)))


async def answer_all(
    app: ASGIApp, lines: Iterator[Line], reading: ThreadPoolExecutor, most: int
) -> AsyncGenerator[list[tuple[Line, Answer]]]:
    """The answers of lines as they come, those together that came together; `most` lines run at once.

    `lines` is read in the thread of `reading`.
    """
    running: dict[asyncio.Task[Answer], Line] = {}
    waiting: list[Line] = []
    more = True
    try:
        while more or waiting or running:
            if more and len(waiting) < READ:
                found = await _next_lines(lines, reading)
                more = bool(found)
                waiting += found
            while waiting and len(running) < most:
                line = waiting.pop(0)
                running[asyncio.create_task(execute(app, line))] = line
            if running:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                yield [(running.pop(task), task.result()) for task in done]
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def check_file(lines: Iterator[Line | LineError], settings: Settings) -> tuple[int, list[LineError]]:
    """How many lines there are, and what is wrong with them."""
    total, errors, seen = 0, list[LineError](), set[str]()
    for line in lines:
        total += 1
        if isinstance(line, LineError):
            errors.append(line)
        elif line.custom_id in seen:
            text = f"custom_id: {line.custom_id!r} is that of an earlier line, too"
            errors.append(LineError("duplicate_custom_id", text, line.number, "custom_id"))
        else:
            seen.add(line.custom_id)
        if total > settings.max_batch_lines:
            text = f"the file has more than {settings.max_batch_lines} lines, the server's max_batch_lines"
            return total, [LineError("too_many_lines", text, line.number)]
        if len(errors) >= MAX_ERRORS:
            break
    if not total:
        errors.append(LineError("empty_file", "the file has no line", 1))
    return total, errors
