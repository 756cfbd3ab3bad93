"""A small HTTP/1.1 client for benchmarks: its own time must not show beside a server's on the same processors."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import urlsplit

import httptools

READ_SIZE = 1 << 16


class RequestFailed(Exception):
    """An answer that is not 200, or a connection that ended before its answer did."""


class _Answer:
    """What httptools' parser has seen of an answer."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []  # of the body, not yet taken
        self.complete = self.keep_alive = False
        self.parser = httptools.HttpResponseParser(self)

    def on_headers_complete(self) -> None:
        self.keep_alive = self.parser.should_keep_alive()

    def on_body(self, piece: bytes) -> None:
        self.pieces.append(piece)

    def on_message_complete(self) -> None:
        self.complete = True


class Client:
    """Requests to one server, any number at a time, each on a connection of its own; idle ones are used again."""

    def __init__(self, url: str, *, api_key: str | None = None, keep_alive: bool = True) -> None:
        """`url` is a server's root, with or without /v1. ValueError when it is not one."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: not an http:// or https:// URL")
        self.url = url
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._keep_alive = keep_alive
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        headers = [f"Host: {parts.netloc}", "Content-Type: application/json", "Accept: */*"]
        headers.append(f"Connection: {'keep-alive' if keep_alive else 'close'}")
        if api_key:
            headers.append(f"Authorization: Bearer {api_key}")
        self._headers = "".join(f"{line}\r\n" for line in headers)

    async def request(self, method: str, path: str, body: Any = None) -> AsyncGenerator[bytes]:
        """Send one request; the answer's body comes in pieces, as they arrive.

        Raises:
            RequestFailed: the status is not 200 (the message has the body's beginning), or the answer is cut off.
            OSError: no connection.
        """
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self._root}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(content)}\r\n\r\n"
        connection, first = await self._send(head.encode() + content)
        reader, writer = connection
        answer = _Answer()
        parser = answer.parser
        try:
            parser.feed_data(first)
            failed = parser.get_status_code() != 200
            errors = b""
            while True:
                for piece in answer.pieces:
                    if failed:
                        errors += piece
                    else:
                        yield piece
                answer.pieces.clear()
                if answer.complete:
                    break
                data = await reader.read(READ_SIZE)
                if not data:
                    raise RequestFailed(f"{path}: the connection ended in the middle of an answer")
                parser.feed_data(data)
            if failed:
                raise RequestFailed(f"{path}: {parser.get_status_code()}: {errors[:300].decode(errors='replace')}")
        finally:
            if answer.complete and answer.keep_alive and self._keep_alive:
                self._idle.append(connection)
            else:
                writer.close()

    async def json(self, method: str, path: str, body: Any = None) -> Any:
        """The whole answer, parsed. Raises what `request` raises, and ValueError when it is not JSON."""
        return json.loads(b"".join([piece async for piece in self.request(method, path, body)]))

    async def _send(self, data: bytes) -> tuple[tuple[asyncio.StreamReader, asyncio.StreamWriter], bytes]:
        """A connection with the request on its way, and the first bytes of its answer."""
        while self._idle:
            reader, writer = self._idle.pop()
            with contextlib.suppress(ConnectionError):  # the server may have closed it meanwhile
                writer.write(data)
                if first := await reader.read(READ_SIZE):
                    return (reader, writer), first
            writer.close()
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls or None)
        writer.write(data)
        first = await reader.read(READ_SIZE)
        if not first:
            writer.close()
            raise RequestFailed("the connection ended before an answer")
        return (reader, writer), first

    async def model_name(self) -> str:
        """The first model that the server lists."""
        name: str = (await self.json("GET", "/v1/models"))["data"][0]["id"]
        return name

    async def close(self) -> None:
        """Close idle connections."""
        for _, writer in self._idle:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self._idle.clear()
