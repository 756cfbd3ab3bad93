"""The HTTP application over an engine: its routes, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match

from server.batches.runner import Runner
from server.batches.store import Store
from server.engine.async_engine import AsyncEngine
from server.errors import BodyTooLarge, Cancelled, InvalidRequest, MethodNotAllowed, NotFound, UserError
from server.keys import keys_of
from server.metrics import Metrics
from server.middleware import Cors, Guard, HeaderLimits, IgnoreUnknownFields, RequestLog, RootPath
from server.openapi import openapi_document
from server.protocol.body import REFUSED
from server.replicas import Replicas, no_others
from server.routes.batches import batches_router
from server.routes.chat import chat_router
from server.routes.completions import completions_router
from server.routes.control import control_router
from server.routes.docs import docs_router
from server.routes.embeddings import embeddings_router
from server.routes.files import files_router
from server.routes.health import health_router
from server.routes.hidden_states import hidden_states_router
from server.routes.loglikelihood import loglikelihood_router
from server.routes.metrics import metrics_router
from server.routes.models import models_router
from server.routes.one_place import one_place_router
from server.routes.pages import DOCS_PATHS, pages_router
from server.routes.perplexity import perplexity_router
from server.routes.playground import PLAYGROUND_PATHS, playground_router
from server.routes.requests import Running, requests_router
from server.routes.respond import error_response
from server.routes.responses import responses_router
from server.routes.tokenize import tokenize_router
from server.settings import Settings
from server.version import package_version

if TYPE_CHECKING:  # it needs the extra `otel`
    from server.tracing import Tracing

logger = logging.getLogger(__name__)

WATCH_INTERVAL = 0.1  # seconds between looks at the event loop

FLUSH_TIMEOUT = 2.0  # seconds

UNION_TAG = re.compile(r"str|int|float|bool|(list|dict|function-\w+)\[.*\]")
"""What pydantic puts into the `loc` of an error for a member of a union."""


def create_app(engine: AsyncEngine, settings: Settings, metrics: Metrics, replicas: Replicas | None = None) -> FastAPI:
    """The application, alone or as one of `replicas`. It starts the engine and the batches, and drains and stops them
    at the end.

    Raises:
        ValueError: data_dir cannot be used, or a setting needs an extra that is not installed.
    """
    tracing = _tracing_of(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        if runner is not None:
            runner.start()
        metrics.set_engine(package_version(), engine.backend, engine.blocks)
        watching = asyncio.create_task(_watch_loop(metrics))
        try:
            yield
        finally:
            watching.cancel()
            if runner is not None:
                await runner.stop()
            await engine.stop(settings.drain_timeout)
            if tracing is not None:
                await _send_last_spans(tracing)

    keys, running = keys_of(settings, PLAYGROUND_PATHS | DOCS_PATHS), Running()
    app = FastAPI(
        title="LPA inference server",
        version=package_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,  # FastAPI's document and pages: the pages load their programs from elsewhere
    )
    app.state.settings = settings
    runner = None if settings.data_dir is None else Runner(Store(settings.data_dir), app, settings, metrics)
    app.state.batches, app.state.running = runner, running
    others = no_others if replicas is None else replicas.others
    names = settings.model_names
    document = functools.cache(lambda: openapi_document(app, names, keys, settings.root_path))
    open_document = document
    if keys.client or settings.root_path:
        open_document = functools.cache(lambda: openapi_document(app, () if keys.client else names, keys))
    for router in (
        *([] if replicas is None else [one_place_router()]),
        completions_router(engine, settings),
        chat_router(engine, settings),
        responses_router(engine, settings, running),
        perplexity_router(engine, settings),
        loglikelihood_router(engine, settings),
        files_router(runner),
        batches_router(runner),
        embeddings_router(engine, settings),
        hidden_states_router(engine, settings),
        models_router(engine, settings),
        tokenize_router(engine, settings),
        health_router(engine),
        metrics_router(metrics, runner, replicas),
        requests_router(running, keys, others),
        control_router(engine, keys, others),
        docs_router(document, open_document, settings.root_path),
        playground_router(),
        pages_router(),  # behind docs_router, one of whose paths would be a page's
    ):
        app.router.routes.extend(router.routes)  # include_router would build every route a second time
    app.add_exception_handler(UserError, _on_user_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_client_left)
    # the last one added is the outermost
    max_file = settings.max_file_bytes if runner is not None else settings.max_body_bytes
    app.add_middleware(Guard, keys=keys, max_body=settings.max_body_bytes, max_file=max_file, running=running)
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)
    if settings.ignore_unknown_fields:
        app.add_middleware(IgnoreUnknownFields)
    limits = HeaderLimits(settings.max_header_fields, settings.max_header_bytes)
    app.add_middleware(
        RequestLog,
        enabled=settings.log_requests,
        max_headers=limits,
        metrics=metrics,
        tracing=tracing,
        behind_ray=replicas is not None,
    )
    if settings.root_path:
        app.add_middleware(RootPath, root_path=settings.root_path)
    return app


def _tracing_of(settings: Settings) -> Tracing | None:
    if settings.otlp_traces_endpoint is None:
        return None
    try:
        from server.tracing import Tracing
    except ModuleNotFoundError as error:
        raise ValueError(
            f"otlp_traces_endpoint: {error.name} is not installed; pip install 'lpa-server[otel]' brings it"
        ) from None
    return Tracing(settings.otlp_traces_endpoint, settings.model_name)


async def _send_last_spans(tracing: Tracing) -> None:
    """For a moment: a collector that does not answer must not hold up the end."""
    try:
        async with asyncio.timeout(FLUSH_TIMEOUT):
            await asyncio.to_thread(tracing.close)
    except TimeoutError:
        logger.warning("the collector of traces does not answer: the last spans are lost")


async def _watch_loop(metrics: Metrics) -> None:
    """Observe by how much the event loop is late, for as long as it runs."""
    loop = asyncio.get_running_loop()
    while True:
        planned = loop.time() + WATCH_INTERVAL
        await asyncio.sleep(WATCH_INTERVAL)
        metrics.observe_loop_lag(max(0.0, loop.time() - planned))


async def _on_user_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return error_response(error)


async def _on_client_left(request: Request, _: Exception) -> Response:
    if request.state.cancelled.done():
        return error_response(Cancelled())
    request.state.client_left = True
    return Response(status_code=499)  # nginx's code; the client has closed the connection


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What Starlette and FastAPI refuse themselves."""
    assert isinstance(error, HTTPException)
    what: UserError
    if isinstance(error.__cause__, ClientDisconnect):  # FastAPI wraps what reading the body raises
        return await _on_client_left(request, error.__cause__)
    if isinstance(error.__cause__, UserError):
        what = error.__cause__
    elif isinstance(error.__cause__, RequestValidationError):
        what = _explain(error.__cause__.errors()[0])
    elif error.status_code == NotFound.status:
        what = NotFound(f"there is no route {request.method} {request.url.path}")
    elif error.status_code == MethodNotAllowed.status:
        allowed = _allowed(request)
        what = MethodNotAllowed(f"{request.url.path} does not take {request.method}, but {allowed}", allowed=allowed)
    elif error.status_code == BodyTooLarge.status:
        what = BodyTooLarge(error.detail)
    else:
        what = InvalidRequest("the body cannot be read")
    return error_response(what)


def _allowed(request: Request) -> str:
    """The methods that a path takes, of all its routes: Starlette's own header has those of the first."""
    found = (
        method
        for method in ("DELETE", "GET", "POST")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    )
    return ", ".join(found)


async def _on_invalid_body(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(_explain(error.errors()[0]))


def _explain(problem: Any) -> InvalidRequest:
    """pydantic's first error, in terms of the request."""
    loc, kind = tuple(part for part in problem["loc"][1:] if not UNION_TAG.fullmatch(str(part))), problem["type"]
    refused = problem["ctx"] if kind == REFUSED else {}
    loc += tuple(refused.get("loc", ()))
    if kind == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {problem['ctx']['error']} at character {loc[0]}")
    if not loc:
        return InvalidRequest("the body must be a JSON object, sent with Content-Type: application/json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    reason = "is required" if kind == "missing" else problem["msg"][:1].lower() + problem["msg"][1:]
    return InvalidRequest(f"{param}: {reason}", param=param, code=refused.get("code"))
