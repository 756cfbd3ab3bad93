"""The engine thread beside the asyncio loop.

In: a thread-safe inbox of requests and aborts. Out: one `call_soon_threadsafe` per step with that step's outputs.
However a request's consumer goes away (client left, time-out, error), its generator's `finally` aborts it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable

from lpa_model.config import LPAConfig
from server.engine.engine import Engine, StepFailed
from server.engine.request import EngineStats, FinishReason, Request, RequestOutput, SamplingParams
from server.engine.tokenizer import Tokenizer
from server.errors import EngineError, InvalidRequest, QueueFull, Unavailable

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # steps in a row


class AsyncEngine:
    """Owns the engine thread. `generate` is the only road in; all methods belong to the event loop's thread."""

    def __init__(
        self,
        engine: Engine,
        on_stats: Callable[[EngineStats], None],
        *,
        max_queue: int = 1024,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._on_stats = on_stats
        self._on_death = on_death
        self._max_streams = engine.scheduler.max_num_seqs + max_queue
        self._max_queue = max_queue
        self._inbox: queue.SimpleQueue[Request | str | None] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[RequestOutput]] = {}
        self._idle = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.accepting = False
        self.alive = True

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @property
    def model_config(self) -> LPAConfig:
        return self._engine.model_config

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def max_num_seqs(self) -> int:
        return self._engine.scheduler.max_num_seqs

    async def start(self) -> None:
        """Start the engine thread and accept requests."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self.accepting = True

    async def stop(self, drain_timeout: float) -> None:
        """Refuse new requests, give the running ones `drain_timeout` seconds, end what is left, stop the thread."""
        self.accepting = False
        if self._streams:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), drain_timeout)
            except TimeoutError:
                logger.warning("drain time-out: %d requests are cut off", len(self._streams))
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    async def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, *, choice: int = 0
    ) -> AsyncGenerator[RequestOutput]:
        """Run one sequence; the last output has a finish_reason. Closing the generator aborts the request.

        Raises:
            ContextLength, InvalidRequest: it cannot be served.
            QueueFull: too many requests are waiting.
            Unavailable: the server is draining or its engine has died.
            EngineError: the step that held the request failed.
        """
        request = Request(request_id, prompt_ids, params, choice=choice)
        self._engine.validate(request)
        if not (self.accepting and self.alive):
            raise Unavailable("the server is shutting down" if self.alive else "the engine has died")
        if len(self._streams) >= self._max_streams:
            raise QueueFull(f"the waiting queue is full ({self._max_queue} requests); try again later")
        if request_id in self._streams:
            raise InvalidRequest(f"request id {request_id!r} is already in use")
        outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._streams[request_id] = outputs
        self._inbox.put(request)
        finished = False
        try:
            while not finished:
                output = await outputs.get()
                finished = output.finish_reason is not None
                if output.finish_reason is FinishReason.ERROR:
                    raise EngineError(f"the engine failed on this request: {output.error}")
                if output.finish_reason is FinishReason.ABORT:
                    raise Unavailable("the server is shutting down")
                yield output
        finally:
            del self._streams[request_id]
            if not finished:
                self._inbox.put(request_id)
            if not self._streams:
                self._idle.set()

    def _run(self) -> None:
        """The engine thread."""
        engine, failures = self._engine, 0
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
            else:
                self._engine.abort(item)

    def _post(self, outputs: list[RequestOutput], stats: EngineStats, dead: bool) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._deliver, outputs, stats, dead)

    def _deliver(self, outputs: list[RequestOutput], stats: EngineStats, dead: bool) -> None:
        """In the loop's thread: a step's outputs to their streams."""
        for output in outputs:
            if stream := self._streams.get(output.request_id):
                stream.put_nowait(output)
        self._on_stats(stats)
        if dead:
            self.alive = False
            logger.critical("%d steps failed in a row: the engine has died", MAX_FAILURES)
            if self._on_death is not None:
                self._on_death()
