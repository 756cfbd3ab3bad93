"""The HTTP application over an engine: routes, what happens around each request, and errors in OpenAI's shape."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.engine.async_engine import AsyncEngine
from server.errors import BodyTooLarge, EngineError, InvalidRequest, MethodNotAllowed, NotFound, Unauthorized, UserError
from server.metrics import Metrics
from server.routes.chat import chat_router
from server.routes.completions import completions_router
from server.routes.health import health_router, package_version
from server.routes.metrics import metrics_router
from server.routes.models import models_router
from server.routes.perplexity import perplexity_router
from server.routes.respond import ERROR_RESPONSES, error_response
from server.settings import Settings

logger = logging.getLogger(__name__)

WITHOUT_KEY = frozenset({"/health", "/ready", "/metrics"})
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def create_app(engine: AsyncEngine, settings: Settings, metrics: Metrics) -> FastAPI:
    """The application. It starts the engine, and drains and stops it at the end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop(settings.drain_timeout)

    app = FastAPI(
        title="LPA inference server",
        version=package_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        responses=ERROR_RESPONSES,
    )
    app.include_router(completions_router(engine, settings))
    app.include_router(chat_router(engine, settings))
    app.include_router(perplexity_router(engine, settings))
    app.include_router(models_router(settings, engine.max_model_len))
    app.include_router(health_router(engine))
    app.include_router(metrics_router(metrics))
    app.add_exception_handler(UserError, _on_user_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_client_left)
    app.add_middleware(AroundRequest, settings=settings)
    return app


class AroundRequest:
    """Request id, access log, API key, limit of the body, and the answer to what nobody caught.

    It sees every byte of a stream, so it is plain ASGI.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._log = settings.log_requests
        self._max_body = settings.max_body_bytes
        key = settings.api_key
        self._authorization = None if key is None else f"Bearer {key.get_secret_value()}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            await self._app(scope, self._limited(headers, receive), send_with_id)
        except UserError as error:
            await error_response(error)(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if not status:
                await error_response(EngineError("the server failed on this request"))(scope, receive, send_with_id)
        finally:
            if self._log:
                self._log_request(scope, 499 if state.get("client_left") else status, time.monotonic() - began)

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._authorization is None or path in WITHOUT_KEY:
            return
        given = headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, self._authorization):
            raise Unauthorized("send the API key as 'Authorization: Bearer KEY'")

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        """`receive` that ends a body which is too large before all of it has come."""
        limit, received = self._max_body, 0
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

    def _log_request(self, scope: Scope, status: int, seconds: float) -> None:
        fields = {
            "request_id": scope["state"]["request_id"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "duration_ms": round(seconds * 1e3, 2),
        }
        level = logging.DEBUG if scope["path"] in WITHOUT_KEY else logging.INFO  # probes would drown the rest
        logger.log(
            level,
            "%(method)s %(path)r %(status)d %(duration_ms).2f ms %(request_id)s",
            fields,
            extra={"fields": fields},
        )


async def _on_user_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return error_response(error)


async def _on_client_left(request: Request, _: Exception) -> Response:
    request.state.client_left = True
    return Response(status_code=499)  # nginx' number; nobody reads it


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What Starlette and FastAPI refuse themselves."""
    assert isinstance(error, HTTPException)
    what: UserError
    if error.status_code == NotFound.status:
        what = NotFound(f"there is no route {request.method} {request.url.path}")
    elif error.status_code == MethodNotAllowed.status:
        allowed = (error.headers or {}).get("Allow", "")
        what = MethodNotAllowed(f"{request.url.path} does not take {request.method}, but {allowed}", allowed=allowed)
    elif error.status_code == BodyTooLarge.status:
        what = BodyTooLarge(error.detail)
    else:
        what = InvalidRequest("the body is not JSON in UTF-8")
    return error_response(what)


async def _on_invalid_body(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(_explain(error.errors()[0]))


def _explain(problem: Any) -> InvalidRequest:
    """pydantic's first finding, in terms of the request."""
    place, kind = problem["loc"][1:], problem["type"]
    if kind == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {problem['ctx']['error']} at character {place[0]}")
    if not place:
        return InvalidRequest("the body must be a JSON object, sent with Content-Type: application/json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    reason = "is required" if kind == "missing" else problem["msg"][:1].lower() + problem["msg"][1:]
    return InvalidRequest(f"{param}: {reason}", param=param)
