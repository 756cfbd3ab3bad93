"""GET /metrics."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from server.metrics import Metrics
from server.routes.responses import responses

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text format


def metrics_router(metrics: Metrics) -> APIRouter:
    """The route over one server's metrics."""
    router = APIRouter(tags=["Operations"])

    described = responses(None, description="Prometheus' text format.")
    described[200]["content"] = {"text/plain": {"schema": {"type": "string"}}}

    @router.get("/metrics", summary="Metrics for Prometheus", response_class=Response, responses=described)
    async def page() -> Response:
        """Counts, gauges and histograms, times in seconds. Needs no key unless the server has --metrics-key."""
        return Response(metrics.render(), media_type=MEDIA_TYPE)

    return router
