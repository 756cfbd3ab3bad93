"""A small HTTP/1.1 client for benchmarks: its own time must not show beside a server's on the same processors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

import httptools


class RequestFailed(Exception):
    """An answer that is not 200, or a connection that ended before its answer did."""


class _Connection(asyncio.Protocol):
    """One answer at a time. Its pieces go straight to `on_piece`: no task wakes up before the answer's end."""

    def __init__(self) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answered: asyncio.Future[None] | None = None  # nothing has been asked
        self.begun = self.keep_alive = False  # of the last answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    async def ask(self, data: bytes, on_piece: Callable[[bytes], None]) -> None:
        """Send a request and wait for the end of its answer; afterwards `begun` says whether any of one has come."""
        self._on_piece = on_piece
        self._parser = httptools.HttpResponseParser(self)
        self._refusal = b""
        self.begun = self.keep_alive = False
        self._answered = asyncio.get_running_loop().create_future()
        if self.closed.done():
            raise RequestFailed("the connection ended before an answer")
        self.transport.write(data)
        await self._answered

    def data_received(self, data: bytes) -> None:
        if self._answered is None:
            return
        self.begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(RequestFailed(f"the answer is no HTTP: {error}"))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        if self._status == 200:
            self._on_piece(piece)
        else:
            self._refusal += piece

    def on_message_complete(self) -> None:
        self.keep_alive = self._parser.should_keep_alive()
        refusal = self._refusal[:300].decode(errors="replace")
        self._end(None if self._status == 200 else RequestFailed(f"{self._status}: {refusal}"))

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set_result(None)
        where = "in the middle of" if self.begun else "before"
        self._end(error or RequestFailed(f"the connection ended {where} an answer"))

    def _end(self, error: Exception | None) -> None:
        if self._answered is None or self._answered.done():
            return
        if error is None:
            self._answered.set_result(None)
        else:
            self._answered.set_exception(error)


class Client:
    """Requests to one server, any number at a time, each on a connection of its own; idle ones are used again."""

    def __init__(self, url: str, *, api_key: str | None = None, keep_alive: bool = True) -> None:
        """`url` is a server's root, with or without /v1. ValueError when it is not one."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: not an http:// or https:// URL")
        self.url, self.api_key = url, api_key
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._keep_alive = keep_alive
        self._idle: list[_Connection] = []
        headers = [f"Host: {parts.netloc}", "Content-Type: application/json", "Accept: */*"]
        headers.append(f"Connection: {'keep-alive' if keep_alive else 'close'}")
        if api_key:
            headers.append(f"Authorization: Bearer {api_key}")
        self._headers = "".join(f"{line}\r\n" for line in headers)

    async def request(self, method: str, path: str, body: Any, on_piece: Callable[[bytes], None]) -> None:
        """Send one request; `on_piece` gets the pieces of the answer's body as they arrive, until this returns.

        Raises:
            RequestFailed: the status is not 200 (the message has the body's beginning), or the answer is cut off.
            OSError: no connection.
        """
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self._root}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(content)}\r\n\r\n"
        data = head.encode() + content
        while True:
            used = bool(self._idle)
            connection = self._idle.pop() if used else await self._connect()
            try:
                return await connection.ask(data, on_piece)
            except (RequestFailed, OSError) as error:
                if used and not connection.begun:  # the server may have closed it meanwhile
                    continue
                raise error if isinstance(error, OSError) else RequestFailed(f"{path}: {error}") from None
            finally:
                if connection.keep_alive and self._keep_alive:
                    self._idle.append(connection)
                else:
                    connection.transport.close()

    async def fetch(self, method: str, path: str, body: Any = None) -> bytes:
        """The whole answer. Raises what `request` raises."""
        pieces: list[bytes] = []
        await self.request(method, path, body, pieces.append)
        return b"".join(pieces)

    async def json(self, method: str, path: str, body: Any = None) -> Any:
        """The whole answer, parsed. Raises what `request` raises, and ValueError when it is not JSON."""
        return json.loads(await self.fetch(method, path, body))

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls or None)
        return connection

    async def model_name(self) -> str:
        """The first model that the server lists."""
        name: str = (await self.json("GET", "/v1/models"))["data"][0]["id"]
        return name

    async def close(self) -> None:
        """Close idle connections."""
        for connection in self._idle:
            connection.transport.close()
            await connection.closed
        self._idle.clear()
