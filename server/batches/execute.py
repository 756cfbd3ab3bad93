"""One line of a batch through the application, as if a client had sent it: same checks, same answers.

It runs in the background: the engine gives it idle steps, and a few rows of others.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from server.batches.lines import Line
from server.engine.async_engine import in_background
from server.keys import INTERNAL

RETRIED = frozenset({429, 503})
"""Statuses that say nothing of the line: the queue is full, or the server is about to end."""
RETRY_AFTER = 1.0  # seconds


@dataclass(frozen=True)
class Answer:
    """What a line of the output or of the error file says, as JSON text."""

    failed: bool
    text: str


async def execute(app: ASGIApp, line: Line) -> Answer:
    """The answer to a line, however often it has to be tried."""
    request_id = f"batch_req_{secrets.token_hex(12)}"
    content = await asyncio.to_thread(_content, line)  # beside the event loop, as the answer: both may be large
    token = in_background.set(True)
    try:
        while True:
            status, pieces = await _call(app, line.endpoint, content, request_id)
            if status not in RETRIED:
                break
            await asyncio.sleep(RETRY_AFTER)
    finally:
        in_background.reset(token)
    return await asyncio.to_thread(_answer, line, request_id, status, pieces)


def _content(line: Line) -> bytes:
    return json.dumps(line.body).encode()


def _answer(line: Line, request_id: str, status: int, pieces: list[bytes]) -> Answer:
    body = b"".join(pieces).decode()
    response = f'{{"status_code":{status},"request_id":{json.dumps(request_id)},"body":{body}}}'
    return Answer(status != 200, _document(line.custom_id, request_id, response, None))


def unanswered(custom_id: str, code: str, message: str) -> Answer:
    """Of a line that was never run."""
    error = {"code": code, "message": message}
    return Answer(True, _document(custom_id, f"batch_req_{secrets.token_hex(12)}", "null", error))


def _document(custom_id: str, request_id: str, response: str, error: dict[str, Any] | None) -> str:
    names = f'"id":{json.dumps(request_id)},"custom_id":{json.dumps(custom_id)}'
    return f'{{{names},"response":{response},"error":{json.dumps(error)}}}'


async def _call(app: ASGIApp, endpoint: str, content: bytes, request_id: str) -> tuple[int, list[bytes]]:
    """Status, and the pieces of the body. Cancelling it is what a client's leaving is."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": endpoint,
        "raw_path": endpoint.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"x-request-id", request_id.encode()),
        ],
        "client": None,
        "server": None,
        "state": {},
        INTERNAL: True,
    }
    waiting = [{"type": "http.request", "body": content, "more_body": False}]
    never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    status, pieces = 0, list[bytes]()

    async def receive() -> Message:
        return waiting.pop() if waiting else await asyncio.shield(never)

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            pieces.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    finally:
        never.cancel()
    return status, pieces
