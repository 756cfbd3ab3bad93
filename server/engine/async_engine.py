"""The engine thread beside the asyncio loop.

In: a thread-safe inbox of requests and aborts. Out: one `call_soon_threadsafe` per step with that step's outputs.
However a request's consumer goes away (client left, time-out, error), its generator's `finally` aborts it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from contextlib import aclosing, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from lpa_model.config import LPAConfig
from server.engine.block_manager import BlockManager
from server.engine.engine import BackendInfo, Engine, StepFailed
from server.engine.fingerprint import Identity
from server.engine.request import BACKGROUND, EngineStats, FinishReason, GrammarSpec, Request, RequestOutput
from server.engine.tokenizer import Tokenizer
from server.engine.work import Places, Work, work_of_request
from server.errors import EngineError, InvalidRequest, QueueFull, TimedOut, Unavailable

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # steps in a row
MAX_COMPILING = 256  # grammars

in_background: ContextVar[bool] = ContextVar("in_background", default=False)
"""Whether the requests of this context are background work, regardless of their own priority."""


class Mailbox:
    """Outputs on their way to one consumer, merged per sequence, in the order in which they began to wait."""

    def __init__(self) -> None:
        self._waiting: dict[str, RequestOutput] = {}  # by request id
        self._reader: asyncio.Future[None] | None = None
        self._expired = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, output: RequestOutput) -> None:
        earlier = self._waiting.get(output.request_id)
        self._waiting[output.request_id] = output if earlier is None else earlier.merge(output)
        self._wake()

    def expire(self) -> None:
        """Every `get`, now or later, raises TimedOut."""
        self._expired = True
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> RequestOutput:
        """The output that waits longest."""
        while not (self._waiting or self._expired):
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if self._expired:
            raise TimedOut("the request took longer than this server's request_timeout")
        return self._waiting.pop(next(iter(self._waiting)))


class Session:
    """The sequences of one HTTP request, which is left when the request ends.

    It has begun once one of them was taken. From then on a drain waits for it, and its next sequences wait for a place
    in the queue where another request's first one would be refused.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.num_sequences = 0  # with the engine
        self.holds_drain = not in_background.get()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.leave(self)


class AsyncEngine:
    """Owns the engine thread. `generate` is the only entry; all methods belong to the event loop's thread."""

    def __init__(
        self,
        engine: Engine,
        on_stats: Callable[[EngineStats], None],
        *,
        max_queue: int,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._on_stats = on_stats
        self._on_death = on_death
        self._max_streams = engine.scheduler.max_num_seqs + max_queue
        self._max_queue = max_queue
        self._inbox: queue.SimpleQueue[Request | str | asyncio.Future[int] | None] = queue.SimpleQueue()
        self._mailboxes: dict[str, Mailbox] = {}  # by request id
        # what a request that has begun leaves to the first sequences of others
        self._reserve = max(min(1, self._max_streams - 1), self._max_streams // 8)
        self._begun: set[Session] = set()
        self._line: dict[Session, deque[asyncio.Future[None]]] = {}  # waiting sequences, served round robin
        self._granted = 0  # places granted to waiting sequences and not yet taken
        self._closed = False
        self.num_cut_off = 0  # requests that a drain's time-out has ended
        self._idle = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._warm: asyncio.Future[None]
        self._compiling = 0
        self.accepting = False
        self.alive = True

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @property
    def sampling_defaults(self) -> Mapping[str, float]:
        """Fields of `SamplingParams` for requests that do not say otherwise."""
        return self._engine.sampling_defaults

    @property
    def fingerprint(self) -> str:
        """What must be equal for a seed to give the same text."""
        return self._engine.fingerprint

    @property
    def identity(self) -> Identity:
        """What scores depend on, beside the texts and how they are cut."""
        return self._engine.identity

    @property
    def model_config(self) -> LPAConfig:
        return self._engine.model_config

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def backend(self) -> BackendInfo:
        """What computes."""
        return self._engine.backend

    @property
    def blocks(self) -> BlockManager:
        """Of the cache; its sizes may be read here."""
        return self._engine.scheduler.blocks

    @property
    def max_num_seqs(self) -> int:
        return self._engine.scheduler.max_num_seqs

    def validate(self, token_ids: list[int], max_tokens: int, where: str, limit_field: str) -> None:
        """As `Engine.validate`; from any thread."""
        self._engine.validate(token_ids, max_tokens, where, limit_field)

    async def compile_grammar(self, spec: GrammarSpec) -> None:
        """Have a grammar ready for its request.

        Raises:
            InvalidRequest: it cannot be compiled; the message says where and why.
            QueueFull: too many grammars wait to be compiled.
        """
        compiler = self._engine.runner.compiler
        if compiler.knows(spec):
            return compiler.compile(spec)
        if self._compiling >= MAX_COMPILING:
            raise QueueFull(f"{MAX_COMPILING} grammars wait to be compiled; try again later")
        self._compiling += 1
        try:
            await asyncio.get_running_loop().run_in_executor(compiler.pool, compiler.compile, spec)
        finally:
            self._compiling -= 1

    async def start(self) -> None:
        """Start the engine thread, wait until it is warm, and accept requests. Raises what its warming up raises."""
        self._loop = asyncio.get_running_loop()
        self._warm = self._loop.create_future()
        self._thread.start()
        await self._warm
        self.accepting = True

    async def stop(self, drain_timeout: float) -> None:
        """Refuse new requests, give those that have begun `drain_timeout` seconds, end what is left, stop the thread.
        Background work is run again later, and not waited for.

        A second call does nothing.
        """
        if self._closed:
            return
        self.accepting = False
        try:
            async with asyncio.timeout(drain_timeout):
                while self.alive and any(session.holds_drain for session in self._begun):
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            self.num_cut_off = sum(session.holds_drain for session in self._begun)
            logger.warning("drain time-out: %d requests are cut off", self.num_cut_off)
        self._close()
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._engine.close()

    async def reset_prefix_cache(self) -> int:
        """Forget all cached blocks; how many there were.

        Raises:
            Unavailable: the engine has ended.
        """
        if not self.alive or self._closed:
            raise Unavailable("the engine has ended")
        freed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._inbox.put(freed)
        return await freed

    def session(self) -> Session:
        """For a request that calls `generate` several times."""
        return Session(self)

    def leave(self, session: Session) -> None:
        """Forget a session that has ended."""
        self._begun.discard(session)
        self._idle.set()

    async def generate(
        self, requests: Iterable[Request], deadline: float | None = None, session: Session | None = None
    ) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """Run sequences that belong together: (index of the request, output) as they come; the last output of each
        has a finish_reason. They must be such as `validate` accepts. `requests` is read as far as the engine can run
        them at once, so it may be of any length.

        When one fails or the generator is closed, all are aborted. A consumer that does not keep up gets outputs
        merged, at most one per sequence waiting.

        Args:
            deadline: when the sequences time out, on the event loop's clock.
            session: of the request that these sequences are part of; without one they are all of it.

        Raises:
            QueueFull: too many requests are waiting, and this one has not begun.
            RateLimited: the client has all the sequences it may have, and this request has not begun.
            Unavailable: the server is draining and this request has not begun, the drain's time has passed, or the
                engine has died.
            EngineError: the step that held a request failed.
            TimedOut: the deadline has passed.
        """
        with self.session() if session is None else nullcontext(session) as of_request:
            async with aclosing(self._generate(requests, deadline, of_request)) as outputs:
                async for index, output in outputs:
                    yield index, output

    async def _generate(
        self, requests: Iterable[Request], deadline: float | None, session: Session
    ) -> AsyncGenerator[tuple[int, RequestOutput]]:
        mailbox = Mailbox()
        timer = None if deadline is None else asyncio.get_running_loop().call_at(deadline, mailbox.expire)
        remaining = enumerate(requests)
        index_of: dict[str, int] = {}
        work = work_of_request.get() or Work()
        upcoming = next(remaining, None)
        try:
            while index_of or upcoming:
                while upcoming and (not index_of or self._may_add(index_of, work.places)):
                    index, request = upcoming
                    await self._submit(request, mailbox, session, deadline, work.places)
                    index_of[request.id] = index
                    upcoming = next(remaining, None)
                output = await mailbox.take()
                index = index_of[output.request_id]
                if output.finish_reason is not None:
                    del index_of[output.request_id]
                    self._forget(output.request_id, session, work.places)
                    if output.finished is not None:
                        work.add(output.finished)
                    else:
                        work.abort(1)
                if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    if output.token_ids:  # generated before, and merged with the end
                        yield index, replace(output, finish_reason=None)
                    if output.invalid_param is not None:
                        raise InvalidRequest(str(output.error), param=output.invalid_param or None)
                    if output.finish_reason is FinishReason.ERROR:
                        raise EngineError(f"the engine failed on this request: {output.error}")
                    raise Unavailable("the server is shutting down")
                yield index, output
        finally:
            if timer is not None:
                timer.cancel()
            work.abort(len(index_of))
            for request_id in index_of:
                self._forget(request_id, session, work.places)
                self._inbox.put(request_id)

    @property
    def _num_taken(self) -> int:
        return len(self._mailboxes) + self._granted

    def _may_add(self, running: Collection[str], places: Places | None) -> bool:
        """Whether a generator that has `running` sequences with the engine may add one, or is to wait for its own."""
        free = self._num_taken < self._max_streams - self._reserve and not (places is not None and places.is_full)
        return free and not self._line and len(running) < self.max_num_seqs

    async def _submit(
        self, request: Request, mailbox: Mailbox, session: Session, deadline: float | None, places: Places | None
    ) -> None:
        self._check_open(session)
        if places is not None:
            await places.take(may_wait=session in self._begun, deadline=deadline)
        try:
            await self._take_place(request, session, deadline)
        except BaseException:
            if places is not None:
                places.release()
            raise
        self._begun.add(session)
        session.num_sequences += 1
        self._mailboxes[request.id] = mailbox
        if in_background.get():
            request.priority = BACKGROUND
        self._inbox.put(request)

    async def _take_place(self, request: Request, session: Session, deadline: float | None) -> None:
        self._check_open(session)
        if session in self._begun:
            if self._line or not self._may_have(session):
                await self._wait_for_place(session, deadline)
                self._check_open(session)
        elif self._num_taken >= self._max_streams:
            raise QueueFull(f"the waiting queue is full ({self._max_queue} requests); try again later")
        if request.id in self._mailboxes:
            raise InvalidRequest(f"request id {request.id!r} is already in use")

    def _check_open(self, session: Session) -> None:
        """Raises Unavailable if no sequence of a request is taken any more."""
        if not self.alive:
            raise Unavailable("the engine has died")
        if self._closed or not (self.accepting or session in self._begun):
            raise Unavailable("the server is shutting down")

    def _may_have(self, session: Session) -> bool:
        """Whether a request that has begun may have one more place. One that has none goes first."""
        return self._num_taken < self._max_streams - (self._reserve if session.num_sequences else 0)

    async def _wait_for_place(self, session: Session, deadline: float | None) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.setdefault(session, deque()).append(place)
        self._hand_out()
        try:
            async with asyncio.timeout_at(deadline):
                await place
        except TimeoutError:
            raise TimedOut("the request took longer than this server's request_timeout") from None
        finally:
            if place.done() and not place.cancelled():
                self._granted -= 1
                session.num_sequences -= 1  # `_submit` counts it
            place.cancel()
            self._hand_out()

    def _hand_out(self) -> None:
        """Grant free places to waiting sequences, round robin over requests."""
        while self._line:
            idle = (session for session in self._line if not session.num_sequences)
            session = next(idle, next(iter(self._line)))
            if not (self._closed or self._may_have(session)):
                return
            places = self._line.pop(session)
            place = places.popleft()
            if places:
                self._line[session] = places  # behind the others
            if not place.done():
                self._granted += 1
                session.num_sequences += 1
                place.set_result(None)

    def _forget(self, request_id: str, session: Session, places: Places | None) -> None:
        if places is not None:
            places.release()
        del self._mailboxes[request_id]
        session.num_sequences -= 1
        self._hand_out()

    def _close(self) -> None:
        """Accept nothing more; sequences that wait for a place raise Unavailable."""
        self._closed = True
        self._hand_out()
        self._idle.set()

    def _run(self) -> None:
        """The engine thread."""
        engine, failures = self._engine, 0
        try:
            engine.warm_up()
        except Exception as error:
            self._reply(self._warm, error)
            return
        self._reply(self._warm, None)
        while self._take_inbox():
            outputs: list[RequestOutput] = []
            if engine.has_work:
                try:
                    outputs, failures = engine.step(), 0
                except StepFailed as failed:
                    outputs, failures = failed.outputs, failures + 1
                except Exception:
                    logger.exception("the scheduler failed")
                    failures = MAX_FAILURES
            dead = failures >= MAX_FAILURES
            if dead:
                outputs += engine.abort_all()
            self._post(outputs, engine.take_stats(), dead)
            if dead:
                return
        self._post(engine.abort_all(), engine.take_stats(), False)

    def _take_inbox(self) -> bool:
        """Apply what has come in, waiting for it if there is nothing else to do; False to stop."""
        block = not self._engine.has_work
        while True:
            try:
                item = self._inbox.get(block=block)
            except queue.Empty:
                return True
            block = False
            if item is None:
                return False
            if isinstance(item, Request):
                self._engine.add_request(item)
            elif isinstance(item, asyncio.Future):
                self._reply(item, self._engine.scheduler.blocks.forget())
            else:
                self._engine.abort(item)

    def _reply(self, future: asyncio.Future[Any], value: Any) -> None:
        """Answer the event loop, with an exception if that is the value."""

        def set_result() -> None:
            if future.done():
                return
            if isinstance(value, Exception):
                future.set_exception(value)
            else:
                future.set_result(value)

        assert self._loop is not None
        self._loop.call_soon_threadsafe(set_result)

    def _post(self, outputs: list[RequestOutput], stats: EngineStats, dead: bool) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._deliver, outputs, stats, dead)

    def _deliver(self, outputs: list[RequestOutput], stats: EngineStats, dead: bool) -> None:
        """In the loop's thread: a step's outputs to their streams."""
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is not None:
                mailbox.put(output)
        self._on_stats(stats)
        if dead:
            self.alive = False
            self._close()
            logger.critical("%d steps failed in a row: the engine has died", MAX_FAILURES)
            if self._on_death is not None:
                self._on_death()
