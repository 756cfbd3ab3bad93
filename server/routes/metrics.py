"""GET /metrics."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from server.metrics import Metrics


def metrics_router(metrics: Metrics) -> APIRouter:
    """The route over one server's metrics."""
    router = APIRouter(tags=["Operations"])

    @router.get("/metrics", summary="Metrics for Prometheus")
    async def page() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
