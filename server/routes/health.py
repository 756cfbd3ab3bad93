"""GET /health, /ready and /version."""

from __future__ import annotations

from fastapi import APIRouter

from server.engine.async_engine import AsyncEngine
from server.errors import Unavailable
from server.protocol.answers import HealthResponse, ReadyResponse, RefusedBackend, VersionResponse
from server.routes.described import responses
from server.version import package_version


def health_router(engine: AsyncEngine) -> APIRouter:
    """The routes over one engine."""
    router = APIRouter(tags=["Operations"])

    @router.get("/health", summary="Whether the engine lives", responses=responses(None, 503))
    async def health() -> HealthResponse:
        """200 while the engine lives, else 503. Needs no key."""
        if not engine.alive:
            raise Unavailable("the engine has died")
        return HealthResponse()

    @router.get("/ready", summary="Whether requests are taken", responses=responses(None, 503))
    async def ready() -> ReadyResponse:
        """200 while requests are taken, 503 while the server starts or drains. Needs no key."""
        if not (engine.alive and engine.accepting):
            raise Unavailable("the server takes no requests")
        return ReadyResponse()

    @router.get("/version", summary="Version of the server", responses=responses(None))
    async def server_version() -> VersionResponse:
        """The version of the installed package, and the backend that computes."""
        backend = engine.backend
        return VersionResponse(
            version=package_version(),
            backend=backend.name,
            batch_invariant=backend.batch_invariant,
            refused_backends=[RefusedBackend(backend=name, reason=reason) for name, reason in backend.refused],
        )

    return router
