"""GET /health, /ready and /version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter

from server.engine.async_engine import AsyncEngine
from server.errors import Unavailable


def health_router(engine: AsyncEngine) -> APIRouter:
    """The routes over one engine."""
    router = APIRouter(tags=["Operations"])

    @router.get("/health", summary="200 while the engine lives, else 503")
    async def health() -> dict[str, str]:
        if not engine.alive:
            raise Unavailable("the engine has died")
        return {"status": "ok"}

    @router.get("/ready", summary="200 while requests are taken, 503 while the server starts or drains")
    async def ready() -> dict[str, str]:
        if not (engine.alive and engine.accepting):
            raise Unavailable("the server takes no requests")
        return {"status": "ready"}

    @router.get("/version", summary="Version of the server")
    async def server_version() -> dict[str, str]:
        return {"version": package_version()}

    return router


def package_version() -> str:
    """Version of the installed package; "0" when the code runs without being installed."""
    try:
        return version("lpa-server")
    except PackageNotFoundError:
        return "0"
