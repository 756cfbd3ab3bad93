"""Answers: JSON, OpenAI's error object, and a handler's work that ends when its client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable, Iterator
from json.encoder import encode_basestring
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import UserError
from server.protocol.json_text import WIDE, JsonText
from server.settings import Settings

T = TypeVar("T")

to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""Compact JSON of a value; never NaN or infinity."""


SMALL = WIDE  # values; so no answer with a JsonText is small
RUN = 1 << 13  # numbers or texts
PIECE = 1 << 18  # characters or bytes, about
LEVELS = 5  # an answer, its choices, a choice, its log-probabilities, their rows

TEXT = "\0"
"""Placeholder of the text in what `with_text` is given."""


def with_text(value: Any) -> Callable[[str], str]:
    """A function from a text to the compact JSON of a value in which it replaces TEXT.

    A stream sends thousands of chunks that differ in nothing else, and encoding each one whole is slow.
    """
    before, after = to_json(value).split(to_json(TEXT))
    return lambda text: f"{before}{encode_basestring(text)}{after}"


def json_response(value: Any) -> Response:
    """200 with a JSON body."""
    return Response(to_json(value), media_type="application/json")


class JsonPieces(Response):
    """200 with JSON whose bytes come in pieces, sent one by one: as one text, a hundred megabytes would block
    the event loop each time they are copied."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self.media_type = "application/json"
        self.init_headers({"content-length": str(sum(map(len, pieces)))})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send_pieces(send, self._pieces)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def send_pieces(send: Send, pieces: Iterable[bytes]) -> None:
    """A part of a body, which may be large."""
    for number, piece in enumerate(pieces):
        if number:
            await asyncio.sleep(0)  # `send` does not suspend while the reader keeps up
        await send({"type": "http.response.body", "body": piece, "more_body": True})


async def large_json_response(size: int, make: Callable[[], dict[str, Any]]) -> Response:
    """200 with the JSON of what `make` returns; both are made beside the event loop unless the answer is small: `size`
    is about the number of its values."""
    found = await large_json(size, make)
    return Response(found, media_type="application/json") if isinstance(found, str) else JsonPieces(found)


async def large_json(size: int, make: Callable[[], Any]) -> str | list[bytes]:
    """The JSON of what `make` returns, both made beside the event loop unless there are few values: about `size`. Then
    it comes in pieces."""
    if size <= SMALL:
        return to_json(make())
    return await asyncio.to_thread(lambda: in_pieces(json_parts(make(), LEVELS)))


def json_parts(value: Any, levels: int) -> Iterator[str]:
    """`to_json` of a value in parts, since the encoder holds the GIL: so many levels of it are taken apart."""
    if isinstance(value, JsonText):
        yield from value.parts()
    elif levels and isinstance(value, dict) and value:
        before = "{"
        for name, entry in value.items():
            yield f"{before}{to_json(name)}:"
            yield from json_parts(entry, levels - 1)
            before = ","
        yield "}"
    elif levels and isinstance(value, list) and value:
        before = "["
        if any(isinstance(entry, dict | list | JsonText) for entry in value[:2]):  # the first may be null
            for entry in value:
                yield before
                yield from json_parts(entry, levels - 1)
                before = ","
        else:
            for start in range(0, len(value), RUN):
                yield f"{before}{to_json(value[start : start + RUN])[1:-1]}"
                before = ","
        yield "]"
    else:
        yield to_json(value)


def in_pieces(parts: Iterable[str]) -> list[bytes]:
    """The parts of a text as UTF-8, few and of about PIECE bytes each."""
    pieces: list[bytes] = []
    waiting: list[str] = []
    size = 0
    for part in parts:
        waiting.append(part)
        size += len(part)
        if size >= PIECE:
            pieces.append("".join(waiting).encode())
            waiting, size = [], 0
    return [*pieces, "".join(waiting).encode()]


def error_response(error: UserError) -> Response:
    """The error's status, headers and object. ASCII, since a message may quote half a surrogate pair."""
    return Response(json.dumps(error.body()), error.status, error.headers(), "application/json")


def deadline_of(settings: Settings) -> float | None:
    """The deadline of a request that arrives now, on the event loop's clock; None: none."""
    timeout = settings.request_timeout
    return None if timeout is None else asyncio.get_running_loop().time() + timeout


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves; the request's body must have been read.

    Raises:
        ClientDisconnect: the client has left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
