"""Bodies and answers of lines (application/x-ndjson) that are read and written while the work goes on."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.errors import BodyTooLarge, Cancelled, EngineError, UserError
from server.routes.respond import while_connected

logger = logging.getLogger(__name__)

NDJSON = "application/x-ndjson"
PATHS = frozenset({"/v1/perplexity"})  # of routes that read such bodies as they come, and limit each line themselves


def has_lines(path: str, headers: Headers) -> bool:
    """Whether a request's body is read line by line."""
    return path in PATHS and headers.get("content-type", "").partition(";")[0].strip().lower() == NDJSON


class LineBody:
    """A request's body as lines. A reader that is behind holds the client back.

    `receive` takes the place of the request's own and must be called until it gives http.disconnect, as
    `while_connected` does; it passes the body on to `batches`.
    """

    def __init__(self, receive: Receive, max_line_bytes: int) -> None:
        self._receive = receive
        self._limit = max_line_bytes
        self._pieces: asyncio.Queue[Message] = asyncio.Queue(1)

    async def receive(self) -> Message:
        """The server's next message, once there is room for it."""
        message = await self._receive()
        if message["type"] == "http.request":
            await self._pieces.put(message)
        return message

    async def batches(self) -> AsyncGenerator[list[tuple[int, bytes]]]:
        """(number from 1, line) of the lines that came together, blank ones left out.

        Raises:
            BodyTooLarge: a line is too long; it is named.
        """
        number, begun, size, more = 1, [], 0, True
        while more:
            message = await self._pieces.get()
            more = message.get("more_body", False)
            first, *others = message.get("body", b"").split(b"\n")
            begun.append(first)
            size += len(first)
            batch = []
            for piece in others if more else [*others, b""]:
                self._check(number, size)
                batch.append((number, b"".join(begun)))
                number, begun, size = number + 1, [piece], len(piece)
            self._check(number, size)
            batch = [(i, line) for i, line in batch if not line.isspace() and line]
            if batch:
                yield batch

    def _check(self, number: int, size: int) -> None:
        if size > self._limit:
            raise BodyTooLarge(f"line {number}: has more than {self._limit} bytes, the limit of a line")


class LineStream(Response):
    """Sends each string of `lines` as a line and closes the generator however the stream ends.

    An error before the first line is an answer with its own status. One in the middle becomes a last line with
    OpenAI's error object. A reader that does not keep up holds the generator back; one that leaves ends it, and so
    does cancelling, which is told as an error.
    """

    media_type = NDJSON

    def __init__(self, lines: AsyncGenerator[str], body: LineBody | None = None) -> None:
        self.status_code = 200
        self.background = None
        # proxies that buffer would turn a stream into one late answer
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._lines = lines
        self._body = body
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._body.receive if self._body else receive, self._send_all(send))
        except ClientDisconnect:
            state = scope["state"]
            if not state["cancelled"].done():
                state["client_left"] = True
                return
            if not self._started:
                raise Cancelled() from None
            await _send_line(send, json.dumps(Cancelled().body()))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._lines) as lines:
            first = await anext(lines)
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await _send_line(send, first)
                async for line in lines:
                    await _send_line(send, line)
            except UserError as error:
                await _send_line(send, json.dumps(error.body()))
            except Exception:
                logger.exception("a stream failed")
                await _send_line(send, json.dumps(EngineError("the server failed in the middle of the stream").body()))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_line(send: Send, line: str) -> None:
    await send({"type": "http.response.body", "body": f"{line}\n".encode(), "more_body": True})
