"""Server-sent events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import Cancelled, EngineError, UserError
from server.routes.respond import while_connected
from server.routes.waiting import COMMENT

logger = logging.getLogger(__name__)

DONE = "[DONE]"


class EventStream(Response):
    """Sends `first` and each string of `events` as one event, and closes the generator however the stream ends. That
    the first has come shows that the engine took the request, so that a refusal has its status.

    An error in the middle becomes an event with OpenAI's error object, and the stream ends without [DONE]. A reader
    that does not keep up holds the generator back; one that leaves ends it, and so does cancelling, which is told as
    an error.
    """

    media_type = "text/event-stream"

    def __init__(self, first: str, events: AsyncGenerator[str]) -> None:
        self.status_code = 200
        self.background = None
        # proxies that buffer would turn a stream into one late answer
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._first = first
        self._events = events
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send))
        except ClientDisconnect:
            state = scope.setdefault("state", {})
            if "cancelled" not in state or not state["cancelled"].done():
                state["client_left"] = True
                return
            if not self._started:
                await self._start(send)
            await _send_event(send, json.dumps(Cancelled().body()))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await self._start(send)
            try:
                await _send_event(send, self._first)
                async for event in events:
                    await _send_event(send, event)
            except UserError as error:
                await _send_event(send, json.dumps(error.body()))
            except Exception:
                logger.exception("a stream failed")
                body = EngineError("the server failed in the middle of the stream").body()
                await _send_event(send, json.dumps(body))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, data: str) -> None:
    line = data if data == COMMENT else f"data: {data}"
    await send({"type": "http.response.body", "body": f"{line}\n\n".encode(), "more_body": True})
