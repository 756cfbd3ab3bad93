"""GET /metrics."""

from __future__ import annotations

import asyncio
import functools
import gzip
import re
from concurrent.futures import ThreadPoolExecutor

from fastapi import APIRouter, Header
from fastapi.responses import Response
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.batches.runner import Runner
from server.metrics import Metrics, render
from server.replicas import Merged, Replicas, labelled
from server.routes.described import responses

GZIP_LEVEL = 1  # a ninth of the size; the highest level takes three times as long for an eleventh
TAKES_GZIP = re.compile(r"(^|,)\s*(gzip|\*)\s*(;\s*q=(?!0(\.0*)?\s*(,|$))[^,]*)?\s*(,|$)", re.IGNORECASE)


def metrics_router(metrics: Metrics, batches: Runner | None, replicas: Replicas | None) -> APIRouter:
    """The route over one server's metrics, those of its batches read from their store; or over all replicas'."""
    router = APIRouter(tags=["Operations"])

    renderer = ThreadPoolExecutor(1, "metrics")  # its own: a scrape must not wait for texts that are tokenized

    described = responses(None, description="Prometheus' text format, or OpenMetrics.")
    described[200]["content"] = {
        kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")
    }

    @router.get("/metrics", summary="Metrics for Prometheus", response_class=Response, responses=described)
    async def page(
        accept: str = Header("", description="application/openmetrics-text is answered in that format."),
        accept_encoding: str = Header("", description="With gzip, the page is compressed."),
    ) -> Response:
        """Counts, gauges and histograms, times in seconds. Needs no key unless the server has --metrics-key.

        With --ray-replicas, of all replicas, by the label `replica`."""
        compressed = TAKES_GZIP.search(accept_encoding) is not None
        loop = asyncio.get_running_loop()
        metrics.set_tasks(len(asyncio.all_tasks()))
        if batches is not None:
            metrics.set_batches(*await batches.call(batches.store.counts))
        if replicas is None:
            work = functools.partial(_render, metrics.registry, accept, compressed)
        else:
            others = await replicas.others("metrics")
            work = functools.partial(_render_all, replicas.name, metrics.registry, others, accept, compressed)
        content, media_type = await loop.run_in_executor(renderer, work)
        headers = {"vary": "accept, accept-encoding"} | ({"content-encoding": "gzip"} if compressed else {})
        return Response(content, media_type=media_type, headers=headers)

    return router


def _render_all(
    name: str, own: Collector, others: list[list[Metric]], accept: str, compressed: bool
) -> tuple[bytes, str]:
    return _render(Merged([labelled(name, own.collect()), *others]), accept, compressed)


def _render(collector: Collector, accept: str, compressed: bool) -> tuple[bytes, str]:
    content, media_type = render(collector, accept)
    return gzip.compress(content, GZIP_LEVEL) if compressed else content, media_type
