"""Answers that come piece by piece: server-sent events, and lines of JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import Cancelled, EngineError, UserError
from server.protocol.safetensors import SAFETENSORS
from server.routes.ndjson import NDJSON
from server.routes.respond import send_pieces, while_connected
from server.routes.waiting import COMMENT

logger = logging.getLogger(__name__)

DONE = "[DONE]"

Line = str | list[bytes]
"""JSON of a line or an event, a long one in pieces."""


class Stream(Response):
    """Sends each of `pieces` in a frame of its own and closes the generator however the stream ends.

    An error before the first piece is an answer with its own status. One in the middle becomes a last piece with
    OpenAI's error object. A reader that does not keep up holds the generator back; one that leaves ends it, and so
    does cancelling, which is told as an error. In a body of known length an error closes the connection instead.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[Any],
        media_type: str,
        frame: Callable[[Any], Iterable[bytes]],
        receive: Receive | None = None,
        *,
        length: int | None = None,
        tells_errors: bool = True,
    ) -> None:
        """`frame` makes bytes of a piece, or of an error's text; `receive` takes the place of the request's own;
        `length` is the body's, in bytes, where it is known. What can tell no error, as one of known length, is cut off
        by one, so that its reader sees it."""
        self.status_code = 200
        self.background = None
        self.media_type = media_type
        # proxies that buffer would turn a stream into one late answer
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        self.init_headers(headers if length is None else {**headers, "content-length": str(length)})
        self._pieces = pieces
        self._frame = frame
        self._receive = receive
        self._tells_errors = tells_errors and length is None
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._receive or receive, self._send_all(send))
        except ClientDisconnect:
            state = scope["state"]
            if not state["cancelled"].done():
                state["client_left"] = True
                return
            if not self._started:
                raise Cancelled() from None
            await self._send_last(send, Cancelled())

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._pieces) as pieces:
            first = await anext(pieces)
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await self._send(send, first)
                async for piece in pieces:
                    await self._send(send, piece)
            except UserError as error:
                await self._send_last(send, error)
            except Exception:
                logger.exception("a stream failed")
                await self._send_last(send, EngineError("the server failed in the middle of the stream"))
            else:
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, piece: Any) -> None:
        await send_pieces(send, self._frame(piece))

    async def _send_last(self, send: Send, error: UserError) -> None:
        if not self._tells_errors:
            logger.warning("a stream is cut off: %s", error.message)
            return
        await self._send(send, json.dumps(error.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event_stream(events: AsyncGenerator[Line]) -> Stream:
    """Server-sent events; a stream that ends as it should ends with DONE."""
    return Stream(events, "text/event-stream", _event)


def _event(data: Line) -> Iterable[bytes]:
    if not isinstance(data, str):
        return (b"data: ", *data, b"\n\n")
    return (f"{data if data == COMMENT else f'data: {data}'}\n\n".encode(),)


def named_event_stream(events: AsyncGenerator[str]) -> Stream:
    """Server-sent events whose texts begin with a line that names them."""
    return Stream(events, "text/event-stream", _named_event)


def _named_event(text: str) -> Iterable[bytes]:
    if text.startswith("{"):  # an error that ends the stream
        text = f"error\ndata: {text}"
    return (f"{text if text == COMMENT else f'event: {text}'}\n\n".encode(),)


def line_stream(lines: AsyncGenerator[Line], receive: Receive) -> Stream:
    """Lines of JSON; `receive` passes on the body that is read meanwhile."""
    return Stream(lines, NDJSON, _line, receive)


def binary_stream(pieces: AsyncGenerator[Iterable[bytes]], length: int) -> Stream:
    """A safetensors file of `length` bytes."""
    return Stream(pieces, SAFETENSORS, lambda piece: piece, length=length)


def _line(line: Line) -> Iterable[bytes]:
    return (f"{line}\n".encode(),) if isinstance(line, str) else (*line, b"\n")
