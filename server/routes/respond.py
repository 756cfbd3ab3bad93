"""Answers: JSON, OpenAI's error object, and a handler's work that ends when its client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from json.encoder import encode_basestring
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive

from server.errors import UserError
from server.settings import Settings

T = TypeVar("T")

to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""Compact JSON of a value; never NaN or infinity."""


SMALL = 2000  # values
PART = 1 << 13  # numbers or texts

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


async def large_json_response(size: int, make: Callable[[], dict[str, Any]]) -> Response:
    """200 with the JSON of what `make` returns; both are made beside the event loop unless the answer is small: `size`
    is about the number of its values."""
    if size <= SMALL:
        return json_response(make())
    content = await asyncio.to_thread(lambda: _in_parts(make()))
    return Response(content, media_type="application/json")


def _in_parts(value: dict[str, Any]) -> str:
    """`to_json` of an object, its lists in parts: the encoder holds the GIL."""
    return f"{{{','.join(f'{to_json(name)}:{_list_in_parts(entry)}' for name, entry in value.items())}}}"


def _list_in_parts(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return to_json(value)
    step = 1 if isinstance(value[0], dict | list) else PART
    parts = (to_json(value[start : start + step])[1:-1] for start in range(0, len(value), step))
    return f"[{','.join(parts)}]"


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
