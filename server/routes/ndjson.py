"""Bodies of lines (application/x-ndjson) that are read while earlier lines are computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive

from server.errors import BodyTooLarge, InvalidRequest
from server.routes.body import JsonRoute

M = TypeVar("M", bound=BaseModel)

NDJSON = "application/x-ndjson"
PATHS = frozenset({"/v1/loglikelihood", "/v1/perplexity"})
"""Of routes that read such bodies as they come, and limit each line themselves."""


def has_lines(path: str, headers: Headers) -> bool:
    """Whether a request's body is read line by line."""
    return path in PATHS and headers.get("content-type", "").partition(";")[0].strip().lower() == NDJSON


def json_or_lines(answer_lines: Callable[[Request], Coroutine[Any, Any, Response]]) -> type[JsonRoute]:
    """Routes whose bodies of lines are read by `answer_lines`; FastAPI reads one of JSON whole."""

    class JsonOrLines(JsonRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer_json = super().get_route_handler()

            async def handle(request: Request) -> Response:
                return await (answer_lines if has_lines(request.url.path, request.headers) else answer_json)(request)

            return handle

    return JsonOrLines


def query_as(model: type[M], request: Request) -> M:
    """The query parameters of a request. Raises RequestValidationError."""
    try:
        return model.model_validate_strings(dict(request.query_params), strict=False)
    except ValidationError as invalid:
        raise RequestValidationError([{**e, "loc": ("query", *e["loc"])} for e in invalid.errors()]) from None


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
        """The server's next message, once the buffer is not full."""
        message = await self._receive()
        if message["type"] == "http.request":
            await self._pieces.put(message)
        return message

    async def batches(self) -> AsyncGenerator[list[tuple[int, bytes]]]:
        """(number from 1, line) of the lines that came together, blank ones left out.

        Raises:
            BodyTooLarge: a line is too long; it is named.
            InvalidRequest: there is no line that is not blank.
        """
        number, begun, size, more = 1, [], 0, True
        has_any = False
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
                has_any = True
                yield batch
        if not has_any:
            raise InvalidRequest("the body has no line")

    def _check(self, number: int, size: int) -> None:
        if size > self._limit:
            raise BodyTooLarge(f"line {number}: has more than {self._limit} bytes, the limit of a line")
