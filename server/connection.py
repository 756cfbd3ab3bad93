"""HTTP/1.1 connections: uvicorn's over h11, with limits on idle connections and on requests that arrive slowly.

h11 rather than httptools: it bounds a request's head, serves requests that offer an upgrade (`Upgrade: h2c`), and is
right for HTTP/1.0 and for a missing Host. The bytes of a head are h11's to count, the number of its fields
`RequestLog`'s.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from http import HTTPStatus
from typing import Any, cast

import h11
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import HeadersTooLarge, InvalidRequest, RequestTimeout, TooManyConnections, UserError
from server.middleware import without_prefix
from server.routes.ndjson import has_lines
from server.settings import Settings

SPARE_DESCRIPTORS = 64  # for all that is no connection


class Connection(H11Protocol):
    """One connection. A head must be complete `header_timeout` seconds after its first byte, or after the connection
    was opened; a body must not stand still for `body_timeout` seconds while the server waits for it, but one of lines
    may. Beyond `max_connections` the one that has been idle longest is closed, or else the new one."""

    settings: Settings
    max_connections: int

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._inner = cast(ASGIApp, self.app)
        self.app = cast(Any, self._stream)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, with the chunks of its streams written here, since h11 takes twice as long for each
        as all the rest. h11 writes heads, ends, and answers that are not streamed."""
        cycle, chunked = self.cycle, False

        async def quick_send(message: Message) -> None:
            nonlocal chunked
            if chunked and message.get("more_body") and not (self.flow.write_paused or cycle.disconnected):
                if body := message.get("body"):
                    self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
                return
            if message["type"] == "http.response.start":
                chunked = _is_chunked(scope, message)
            await send(message)

        await self._inner(scope, receive, quick_send)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a BaseTransport in asyncio
        super().connection_made(transport)
        self._waiting: asyncio.TimerHandle | None = None
        self._last_used = self.loop.time()
        if len(self.connections) > self.max_connections and not self._close_an_idle_one():
            self._refuse(TooManyConnections(f"the server has {self.max_connections} connections, its max_connections"))
            return
        self._wait_for_more()

    def data_received(self, data: bytes) -> None:
        self._last_used = self.loop.time()
        super().data_received(data)
        self._wait_for_more()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._last_used = self.loop.time()
        super().on_response_complete()
        self._wait_for_more()

    @property
    def is_idle(self) -> bool:
        """Whether nothing of a request has come."""
        return self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]

    def _wait_for_more(self) -> None:
        """Start the timer for the rest of a head or body. An idle connection has uvicorn's own timer."""
        if self.transport.is_closing():
            return self._stop_waiting()
        if self.conn.their_state is h11.SEND_BODY:
            self._stop_waiting()
            path = without_prefix(self.scope["path"], self.settings.root_path)
            if not has_lines(path, Headers(raw=self.headers)):
                self._waiting = self.loop.call_later(self.settings.body_timeout, self._give_up_on_body)
        elif self.conn.their_state is not h11.IDLE or self.timeout_keep_alive_task is not None:
            self._stop_waiting()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(self.settings.header_timeout, self._give_up_on_head)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up_on_head(self) -> None:
        self._waiting = None
        if self.is_idle:
            self.transport.close()
        else:
            seconds = self.settings.header_timeout
            self._refuse(RequestTimeout(f"the headers were not complete after {seconds:g} seconds"))

    def _give_up_on_body(self) -> None:
        self._waiting = None
        if self.flow.read_paused:  # the server reads too slowly, not the client
            return self._wait_for_more()
        seconds = self.settings.body_timeout
        self._refuse(RequestTimeout(f"no more of the body has come for {seconds:g} seconds"))

    def _close_an_idle_one(self) -> bool:
        others = (other for other in self.connections if isinstance(other, Connection) and other is not self)
        idle = [other for other in others if other.is_idle]
        if idle:
            min(idle, key=lambda other: other._last_used).transport.abort()
        return bool(idle)

    def _refuse(self, error: UserError) -> None:
        """Answer, if no answer has begun, and close. The request's handler, if there is one, sees a client leave."""
        self._stop_waiting()
        cycle = self.cycle
        of_cycle = cycle is not None and self.conn.their_state is not h11.IDLE  # else that one's answer is complete
        if not (of_cycle and cycle.response_started):
            self.transport.write(_raw_response(error))
        if of_cycle:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this for what h11 cannot read."""
        reason = sys.exc_info()[1]
        if getattr(reason, "error_status_hint", 0) == HeadersTooLarge.status:
            limit = self.settings.max_header_bytes
            self._refuse(HeadersTooLarge(f"the headers have more than {limit} bytes, the server's max_header_bytes"))
        else:
            self._refuse(InvalidRequest(f"this is no HTTP/1.1 request: {str(reason)[:200]}"))

    def _should_upgrade(self) -> bool:
        return False  # an offer, which a server may pass over


def _is_chunked(scope: Scope, start: Message) -> bool:
    """Whether an answer's body has no length and another end than the connection's."""
    return (
        scope["http_version"] == "1.1"
        and scope["method"] != "HEAD"
        and start["status"] == HTTPStatus.OK
        and not any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in start["headers"])
    )


def connection_class(settings: Settings) -> type[Connection]:
    """`Connection` with the limits of settings, and no more connections than there are file descriptors."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = settings.max_connections
    if descriptors != resource.RLIM_INFINITY:
        most = min(most, max(1, descriptors - SPARE_DESCRIPTORS))
    return cast(type[Connection], type("Connection", (Connection,), {"settings": settings, "max_connections": most}))


def _raw_response(error: UserError) -> bytes:
    body = json.dumps(error.body())
    headers: dict[str, Any] = {
        "content-type": "application/json",
        "content-length": len(body),
        **error.headers(),
        "connection": "close",
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", body]).encode()
