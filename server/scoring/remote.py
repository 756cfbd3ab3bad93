"""Texts scored by a running server: one connection to /v1/perplexity, texts and answers on it at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any
from urllib.parse import urlencode, urlsplit

import httptools

from server.scoring.texts import Advance, OnTokens, Place

READ_SIZE = 1 << 16
PIECE = 1 << 14  # bytes that are sent at a time, at least
CONTINUE_TIMEOUT = 1.0  # seconds to wait for "100 Continue" or a refusal


class RequestFailed(ValueError):
    """The server has refused, failed or gone; the message is its own where it gave one."""


def score_texts(
    url: str,
    api_key: str | None,
    asked: dict[str, Any],
    texts: Iterable[tuple[Place, str]],
    advance: Advance,
    on_tokens: OnTokens | None = None,
) -> Iterator[dict[str, Any]]:
    """The lines of the answer to `texts`, each text's with its "file" and "line". Texts are read as the server takes
    them, and it takes them as its answers are.

    Args:
        url: a server's root, with or without /v1.
        asked: parameters of /v1/perplexity without the texts; None is for its default, also for `model`, which then
            is the first that the server lists.

    Raises:
        RequestFailed, ValueError: the message names the text, if it is about one.
    """
    answers = _answers(url, api_key, {**asked, "return_tokens": on_tokens is not None}, texts, advance, on_tokens)

    async def following() -> dict[str, Any] | None:
        return await anext(answers, None)

    with asyncio.Runner() as runner:
        try:
            while (line := runner.run(following())) is not None:
                yield line
        finally:
            runner.run(answers.aclose())


async def _answers(
    url: str,
    api_key: str | None,
    asked: dict[str, Any],
    texts: Iterable[tuple[Place, str]],
    advance: Advance,
    on_tokens: OnTokens | None,
) -> AsyncGenerator[dict[str, Any]]:
    model = asked["model"] or await _first_model(url, api_key)
    query = {name: json.dumps(value) for name, value in asked.items() if isinstance(value, bool | int)}
    query |= {"model": model, "method": asked["method"], "stream": "true"}
    waiting: deque[Place] = deque()  # sent, not yet answered
    count = 0  # answered

    def lines() -> Iterator[bytes]:
        for place, text in texts:
            waiting.append(place)
            yield json.dumps(text).encode() + b"\n"

    complete = False
    try:
        async with aclosing(_exchange(url, f"POST /v1/perplexity?{urlencode(query)}", api_key, lines())) as pieces:
            async for answer in _lines(pieces):
                line = _parse(answer, url)
                if "error" in line:
                    raise RequestFailed(line["error"]["message"])
                complete = line["object"] == "perplexity"
                if not complete:
                    if not waiting:
                        raise RequestFailed(f"{url}: the answer has more texts than were sent")
                    place = waiting.popleft()
                    count += 1
                    advance(place.size, line["num_tokens"])
                    if on_tokens is not None:
                        on_tokens(place, line.pop("tokens"))
                    line = {**place.fields(), **line}
                yield line
    except RequestFailed as error:
        start, colon, message = str(error).partition(": ")
        number = start.removeprefix("line ")
        if colon and start != number and number.isdecimal() and 0 < int(number) - count <= len(waiting):
            raise RequestFailed(f"{waiting[int(number) - count - 1]}: {message}") from None
        raise
    if not complete:
        raise RequestFailed(f"{url}: the answer ended before its last line")


def _parse(line: bytes, url: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() & {"object", "error"}:
        raise RequestFailed(f"{url}: not an answer of /v1/perplexity: {line[:200].decode(errors='replace')}")
    return found


async def _first_model(url: str, api_key: str | None) -> str:
    async with aclosing(_exchange(url, "GET /v1/models", api_key, None)) as pieces:
        name: str = json.loads(b"".join([piece async for piece in pieces]))["data"][0]["id"]
    return name


async def _lines(pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    begun: list[bytes] = []
    async for piece in pieces:
        first, *others = piece.split(b"\n")
        begun.append(first)
        for other in others:
            yield b"".join(begun)
            begun = [other]


class _Answer:
    """What httptools' parser has seen of an answer."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []  # of the body, not yet taken
        self.status = 0
        self.complete = False
        self.parser = httptools.HttpResponseParser(self)

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        self.pieces.append(piece)

    def on_message_complete(self) -> None:
        self.complete = self.status >= 200  # 100 Continue is followed by the answer itself


async def _exchange(
    url: str, request: str, api_key: str | None, lines: Iterator[bytes] | None
) -> AsyncGenerator[bytes]:
    """Send a request, "METHOD /path", with lines as its body; the answer's body comes in pieces meanwhile.

    Raises:
        RequestFailed: no connection, a status that is not 200, or an answer that is cut off.
        Exception: what `lines` raises.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestFailed(f"{url}: not an http:// or https:// URL")
    tls = parts.scheme == "https"
    try:
        reader, writer = await asyncio.open_connection(
            parts.hostname, parts.port or (443 if tls else 80), ssl=tls or None
        )
    except OSError as error:
        raise RequestFailed(f"{url}: {error.strerror or error}") from None
    method, _, path = request.partition(" ")
    headers = [f"{method} {parts.path.rstrip('/').removesuffix('/v1')}{path} HTTP/1.1", f"Host: {parts.netloc}"]
    headers += ["Connection: close", *([f"Authorization: Bearer {api_key}"] if api_key else [])]
    if lines is not None:
        # the server can refuse before it is sent anything: a refusal in the middle of sending may be lost
        headers += ["Content-Type: application/x-ndjson", "Transfer-Encoding: chunked", "Expect: 100-continue"]
    writer.write("".join(f"{line}\r\n" for line in [*headers, ""]).encode())
    answer, refusal = _Answer(), b""
    sending: asyncio.Task[None] | None = None
    try:
        if lines is not None:
            with contextlib.suppress(TimeoutError):
                answer.parser.feed_data(await asyncio.wait_for(_read(reader), CONTINUE_TIMEOUT))
            if answer.status < 200:
                sending = asyncio.create_task(_send(writer, lines))
        while True:
            for piece in answer.pieces:
                if answer.status == 200:
                    yield piece
                else:
                    refusal += piece
            answer.pieces.clear()
            if answer.complete:
                break
            data = await _read(reader)
            if not data:
                if sending is not None and sending.done():
                    await sending
                raise RequestFailed(f"{url}: the connection ended in the middle of the answer")
            answer.parser.feed_data(data)
        if answer.status != 200:
            raise RequestFailed(_message(url, answer.status, refusal))
    except httptools.HttpParserError as error:
        raise RequestFailed(f"{url}: not an HTTP/1.1 server: {error}") from None
    finally:
        if sending is not None:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        writer.transport.abort()  # what is not sent is wanted no more
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _read(reader: asyncio.StreamReader) -> bytes:
    """Some bytes, b"" at the end, however it came."""
    try:
        return await reader.read(READ_SIZE)
    except ConnectionError:
        return b""


async def _send(writer: asyncio.StreamWriter, lines: Iterator[bytes]) -> None:
    """Lines as the chunks of a body. What `lines` raises is raised, and ends the connection."""
    try:
        for piece in _pieces(lines):
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(0)  # drain waits only where there is no room, and answers are to be read
        writer.write(b"0\r\n\r\n")
    except ConnectionError:
        pass  # the answer says why
    except Exception:
        writer.transport.abort()
        raise


def _pieces(lines: Iterator[bytes]) -> Iterator[bytes]:
    piece = b""
    for line in lines:
        piece += line
        if len(piece) >= PIECE:
            yield piece
            piece = b""
    if piece:
        yield piece


def _message(url: str, status: int, body: bytes) -> str:
    try:
        message: str = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{url}: status {status}: {body[:200].decode(errors='replace')}"
    return message
