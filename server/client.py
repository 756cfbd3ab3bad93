"""An HTTP client of one server, for benchmarks and for texts that a running server scores: it reads while it sends."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncGenerator, Iterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp

KEEP_ALIVE = 4.0  # seconds that an idle connection is kept: uvicorn closes one after 5
UPLOAD_PIECE = 1 << 14  # bytes of lines that are sent at a time, at least


class RequestFailed(ValueError):
    """The server refused, failed or closed the connection. `told` is its own message, if any."""

    def __init__(self, message: str, told: str | None = None) -> None:
        super().__init__(message)
        self.told = told


class Client:
    """Requests to one server, any number at a time, each on a connection of its own; idle ones are used again."""

    def __init__(self, url: str, *, api_key: str | None = None, keep_alive: bool = True) -> None:
        """`url` is a server's root, with or without /v1. ValueError when it is not one."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: not an http:// or https:// URL")
        self.url, self.api_key = url, api_key
        self._root = url.rstrip("/").removesuffix("/v1")
        self._keep_alive = keep_alive
        self._headers = {"Accept": "*/*", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None

    async def pieces(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: dict[str, str] | None = None,
        lines: Iterator[bytes] | None = None,
    ) -> AsyncGenerator[bytes]:
        """Send one request; the pieces of the answer's body as they arrive.

        Args:
            body: sent as JSON, unless it is None.
            lines: the body instead, read as the server takes it, which is while it answers.

        Raises:
            RequestFailed: no connection, a status that is not 200, or an answer that is cut off.
            Exception: what `lines` raises.
        """
        where = f"{self._root}{path}"
        upload = None if lines is None else _Upload(lines)
        data = upload.pieces() if upload is not None else None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/x-ndjson"} if lines is not None else {}
        try:
            # a server that refuses does so before it is sent lines: a refusal in the middle of sending may be lost
            async with self._open().request(
                method, where, params=query, data=data, headers=headers, expect100=lines is not None
            ) as response:
                try:
                    if response.status != 200:
                        raise _refusal(where, response.status, await response.read())
                    async for piece in response.content.iter_any():
                        yield piece
                finally:
                    if response.connection is not None and response.connection.transport is not None:
                        response.connection.transport.abort()  # not at its end: the rest is not to be sent
        except aiohttp.ClientError as error:
            if upload is not None and upload.error is not None:
                raise upload.error from None
            raise RequestFailed(f"{where}: {_reason(error)}") from None

    async def fetch(self, method: str, path: str, body: Any = None) -> bytes:
        """The whole answer. Raises what `pieces` raises."""
        return b"".join([piece async for piece in self.pieces(method, path, body)])

    async def json(self, method: str, path: str, body: Any = None) -> Any:
        """The whole answer, parsed. Raises what `pieces` raises, and ValueError when it is not JSON."""
        return json.loads(await self.fetch(method, path, body))

    async def model_name(self) -> str:
        """The first model that the server lists."""
        name: str = (await self.json("GET", "/v1/models"))["data"][0]["id"]
        return name

    async def close(self) -> None:
        """Close idle connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None
            await asyncio.sleep(0)  # connections close in the loop's next iteration

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:  # it belongs to the event loop that runs now
            connector = (
                aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
                if self._keep_alive
                else aiohttp.TCPConnector(limit=0, force_close=True)
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


class _Upload:
    """Lines as the pieces of a body; `error` is what ended them."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self.error: Exception | None = None

    async def pieces(self) -> AsyncGenerator[bytes]:
        piece = b""
        try:
            for line in self._lines:
                piece += line
                if len(piece) >= UPLOAD_PIECE:
                    yield piece
                    piece = b""
                    await asyncio.sleep(0)  # sending yields only at a full buffer; answers have to be read meanwhile
        except Exception as error:
            self.error = error
            raise
        yield piece


def _refusal(where: str, status: int, body: bytes) -> RequestFailed:
    try:
        told: str = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return RequestFailed(f"{where}: status {status}: {body[:300].decode(errors='replace')}")
    return RequestFailed(f"{where}: status {status}: {told}", told)


def _reason(error: aiohttp.ClientError) -> str:
    if isinstance(error, aiohttp.ClientResponseError):
        return "the answer is no HTTP"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the connection ended before an answer"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection ended in the middle of the answer"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        reason = getattr(error.certificate_error, "verify_message", "")
        return f"its certificate is not trusted ({reason}); the variable SSL_CERT_FILE names a file with its authority"
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return f"no TLS: {error.strerror or error}"
    if isinstance(error, aiohttp.ClientOSError):
        if (number := error.errno) is not None and number in errno.errorcode:  # asyncio's own text names no reason
            return os.strerror(number)
        return error.strerror or str(error)
    return str(error)
