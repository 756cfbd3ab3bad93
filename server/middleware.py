"""What happens around every request. It sees every byte of a stream, so it is plain ASGI.

From the outside: RootPath, RequestLog, IgnoreUnknownFields and Cors (where settings ask for them), Guard.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.engine.work import Work, work_of_request
from server.errors import BodyTooLarge, EngineError, HeadersTooLarge, InvalidRequest, UserError
from server.keys import ADMIN, INTERNAL, METRICS, PROBES, Keys
from server.metrics import Metrics
from server.protocol.body import ignore_unknown_fields
from server.quota import RequestRate
from server.routes.files import FILES
from server.routes.ndjson import has_lines
from server.routes.requests import Running
from server.routes.respond import error_response

if TYPE_CHECKING:  # it needs the extra `otel`
    from server.tracing import Tracing

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "other"
RATE_HEADERS = tuple(f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset"))
EXPOSED_HEADERS = ("x-request-id", "retry-after", *RATE_HEADERS)


class HeaderLimits(NamedTuple):
    """Of a request's head."""

    fields: int
    bytes: int


class RootPath:
    """Takes a proxy's prefix off the paths that come with it, since some proxies do so and others do not."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["path"] == self._root_path:  # the page's links are relative
                await RedirectResponse(f"{self._root_path}/")(scope, receive, send)
                return
            scope = {**scope, "path": without_prefix(scope["path"], self._root_path)}
        await self._app(scope, receive, send)


def without_prefix(path: str, prefix: str) -> str:
    """A path behind `prefix`, if it is there."""
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


class RequestLog:
    """Request id, a line in the log, a count in the metrics, a trace, limits on the headers, and HEAD as GET, whose
    body the HTTP server keeps back."""

    def __init__(
        self,
        app: ASGIApp,
        enabled: bool,
        max_headers: HeaderLimits,
        metrics: Metrics,
        tracing: Tracing | None,
        behind_ray: bool,
    ) -> None:
        self._app = app
        self._behind_ray = behind_ray
        self._enabled = enabled
        self._max_headers = max_headers
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        work_of_request.set(work := Work())  # in this request's own context
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not self._behind_ray:  # its proxy sends the same id, beside any that the answer has
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        routed = {**scope, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
        try:
            answer = self._refusal(scope) or self._app
            await answer(routed, receive, send_with_id)
        finally:
            seconds = time.monotonic() - began
            status = 499 if state.get("client_left") or not status else status  # as nginx
            method, route = scope["method"] if scope["method"] in METHODS else OTHER, _route(routed)
            if INTERNAL not in scope:
                self._metrics.observe_http(route, method, status, seconds)
            if (caller := state.get("caller")) is not None:
                self._metrics.observe_caller(caller, work.prompt_tokens, work.completion_tokens)
            if self._tracing is not None and not _is_quiet(scope):
                self._tracing.record(scope, method, route, status, seconds, work)
            if self._enabled:
                self._log(scope, status, seconds, work)

    def _refusal(self, scope: Scope) -> Response | None:
        """Of headers that are too many, or, though they came at once, too large."""
        headers, most = scope["headers"], self._max_headers
        if len(headers) > most.fields:
            return error_response(
                HeadersTooLarge(f"the request has more than {most.fields} headers, the server's max_header_fields")
            )
        size = len(scope["path"]) + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in headers)
        if size > most.bytes:
            return error_response(
                HeadersTooLarge(f"the headers have more than {most.bytes} bytes, the server's max_header_bytes")
            )
        return None

    def _log(self, scope: Scope, status: int, seconds: float, work: Work) -> None:
        fields: dict[str, Any] = {
            "request_id": scope["state"]["request_id"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "duration_ms": round(seconds * 1e3, 2),
        }
        if scope.get("client"):
            fields["client"] = scope["client"][0]
        if "caller" in scope["state"]:
            fields["key"] = scope["state"]["caller"]
        message = "%(method)s %(path)r %(status)d %(duration_ms).2f ms %(request_id)s"
        if work.sequences:
            message += " %(prompt_tokens)d + %(completion_tokens)d tokens, %(finish_reason)s"
            fields |= {
                "sequences": work.sequences,
                "prompt_tokens": work.prompt_tokens,
                "cached_tokens": work.cached_tokens,
                "completion_tokens": work.completion_tokens,
                "finish_reason": ",".join(sorted(work.reasons)),
                **{f"{name}_ms": round(interval * 1e3, 2) for name, interval in work.intervals.items()},
            }
        logger.log(
            logging.DEBUG if _is_quiet(scope) else logging.INFO,
            message,
            fields,
            extra={"fields": fields},
        )


def _is_quiet(scope: Scope) -> bool:
    """Whether a request is one of those that come every few seconds, or by thousands, and would drown the rest."""
    return scope["path"] in PROBES or scope["path"] == METRICS or INTERNAL in scope


def _route(scope: Scope) -> str:
    """The template of the path that a request was routed to; what reached no route counts together, since clients
    choose their paths."""
    return getattr(scope.get("route"), "path", OTHER)


class IgnoreUnknownFields:
    """Bodies may have fields that the server does not know."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ignore_unknown_fields.set(True)  # in this request's own context
        await self._app(scope, receive, send)


class Cors(CORSMiddleware):
    """Starlette's, with refusals in OpenAI's shape. A preflight is answered here, where no key is required."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("DELETE", "GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        refusal = error_response(InvalidRequest(bytes(response.body).decode()))
        refusal.headers["vary"] = response.headers["vary"]
        return refusal


class Guard:
    """Key and its limits, limit of the body, cancelling, and the answer to uncaught exceptions."""

    def __init__(self, app: ASGIApp, keys: Keys, max_body: int, max_file: int, running: Running) -> None:
        self._app = app
        self._keys = keys
        self._max_body = max_body
        self._max_file = max_file
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, state = Headers(scope=scope), scope["state"]
        started = False

        state["role"], caller = self._keys.identify(headers.get("authorization", ""))
        state["owner"] = ADMIN if state["role"] == "admin" else ""
        if caller is not None:
            state["caller"], state["owner"] = caller.name, caller.owner
            if (work := work_of_request.get()) is not None:
                work.places = caller.sequences
            if caller.rate is not None:
                send = _with_limits(send, caller.rate)

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if INTERNAL in scope:
                state["role"] = "client"
            self._keys.check(scope["path"], state["role"])
            if caller is not None and caller.rate is not None and scope["method"] == "POST":
                caller.rate.take()
            with self._running.entry(state["request_id"]) as cancelled:
                state["cancelled"] = cancelled
                limit = self._max_file if scope["path"] == FILES else self._max_body
                limited = receive if has_lines(scope["path"], headers) else _limited(headers, receive, limit)
                await self._app(scope, _until_cancelled(limited, cancelled), watched_send)
        except UserError as error:
            await error_response(error)(scope, receive, send)
        except Exception:
            logger.exception("request %s failed", state["request_id"])
            if not started:
                await error_response(EngineError("the server failed on this request"))(scope, receive, send)


def _limited(headers: Headers, receive: Receive, limit: int) -> Receive:
    """`receive` that ends a body which is too large before all of it has come."""
    received = 0
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise BodyTooLarge(f"the body has {length} bytes; the limit is {limit}")

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            # the one kind of exception that FastAPI lets through while it reads the body
            raise HTTPException(BodyTooLarge.status, f"the body has more than {limit} bytes, the limit")
        return message

    return limited


def _with_limits(send: Send, rate: RequestRate) -> Send:
    """`send` with OpenAI's headers of what a key has left."""

    async def with_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(rate.headers())
        await send(message)

    return with_limits


def _until_cancelled(receive: Receive, cancelled: asyncio.Future[None]) -> Receive:
    """`receive` that reports a disconnect when the request is cancelled: both end the work in the same way."""

    async def until_cancelled() -> Message:
        receiving = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((receiving, cancelled), return_when=asyncio.FIRST_COMPLETED)
            return {"type": "http.disconnect"} if cancelled.done() else receiving.result()
        finally:
            receiving.cancel()

    return until_cancelled
