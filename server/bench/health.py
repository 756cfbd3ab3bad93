"""The longest silence of /health during the largest requests that a server accepts, one after another."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from server.bench.largest import Kind, largest_requests
from server.client import Client
from server.settings import Settings

INTERVAL = 0.002  # seconds between an answer of /health and the next question
REST = 0.2  # seconds after a request, for what the server still does


@dataclass(frozen=True)
class Silence:
    """/health during one request; times in milliseconds."""

    name: str
    body_bytes: int
    status: str
    took_ms: float
    longest_ms: float
    answers: int


def bench_health(
    url: str, api_key: str | None, settings: Settings, on_done: Callable[[Silence], None]
) -> list[Silence]:
    """Every kind, one after another, with /health polled meanwhile; `settings` has the server's limits.

    Raises:
        ValueError: the server cannot be reached, or has ceased to answer.
    """

    async def measure() -> list[Silence]:
        client = Client(url, api_key=api_key)
        found = []
        try:
            for kind in largest_requests(await client.model_name(), settings):
                found.append(await _beside(client, kind))
                on_done(found[-1])
        except OSError as error:  # other errors name the URL
            raise ValueError(f"{url}: {error}") from error
        finally:
            await client.close()
        return found

    return asyncio.run(measure())


async def _beside(client: Client, kind: Kind) -> Silence:
    """One request from a thread, so that writing megabytes does not count as the server's silence."""
    times: list[float] = []
    done = False

    async def ask() -> None:
        while not done:
            asked = time.perf_counter()
            await client.fetch("GET", "/health")
            times.append(time.perf_counter() - asked)
            await asyncio.sleep(INTERVAL)

    asking = asyncio.create_task(ask())
    began = time.perf_counter()
    status = await asyncio.to_thread(_send, client.url, client.api_key, kind)
    took = time.perf_counter() - began
    await asyncio.sleep(REST)
    done = True
    await asking
    size = len(kind.body if kind.raw is None else kind.raw)
    return Silence(kind.name, size, status, took * 1e3, max(times) * 1e3, len(times))


def _send(url: str, api_key: str | None, kind: Kind) -> str:
    """A request on a connection of its own, its answer read to the end; the answer's status."""
    parts = urlsplit(url)
    content = kind.raw
    if content is None:
        key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        head = (
            f"{'POST' if kind.body else 'GET'} {kind.path} HTTP/1.1\r\nhost: {parts.netloc}\r\nconnection: close\r\n"
            f"{key}content-type: {kind.media}\r\ncontent-length: {len(kind.body)}\r\n\r\n"
        )
        content = head.encode() + kind.body
    answer = b""
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=600) as connection:
        with suppress(OSError):  # the server may refuse before it has read everything
            connection.sendall(content)
        with suppress(OSError):
            while piece := connection.recv(1 << 20):
                answer = answer or piece
    return answer.split(b"\r\n", 1)[0].decode("latin-1").removeprefix("HTTP/1.1 ") or "closed"
