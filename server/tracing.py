"""A server span of OpenTelemetry for every HTTP request, sent by OTLP over HTTP. Needs the extra `otel`.

Spans are made when a request has ended, of what its line in the log is made of, and sent by a thread of the library.
"""

from __future__ import annotations

import os
import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from server.engine.work import Work
from server.version import package_version

TIMEOUT = 5.0  # seconds that a collector gets to answer


class Tracing:
    """Sends spans to a collector. Those that wait are bounded: where the collector is down, the rest is dropped."""

    def __init__(self, endpoint: str, model_name: str) -> None:
        """`endpoint` is the URL of a collector's traces, like http://localhost:4318/v1/traces. Headers, sampling, the
        service's name and more are OpenTelemetry's own variables, OTEL_..."""
        self._model_name = model_name
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {SERVICE_NAME: "lpa"}
        resource = Resource.create({SERVICE_VERSION: package_version(), **named})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=TIMEOUT)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("lpa", package_version())
        self._context = TraceContextTextMapPropagator()  # W3C

    def record(self, scope: Scope, method: str, route: str, status: int, seconds: float, work: Work) -> None:
        """The span of a request that took `seconds` until now, under the one that its header `traceparent` names, with
        events `queue`, `prefill` and `decode` where each of them begins."""
        wall, monotonic = time.time_ns(), time.monotonic()

        def epoch(instant: float) -> int:
            """Nanoseconds since the epoch of an instant on `time.monotonic`."""
            return wall - int((monotonic - instant) * 1e9)

        attributes: dict[str, str | int | float | list[str]] = {
            "http.request.method": method,
            "http.route": route,
            "url.path": scope["path"],
            "http.response.status_code": status,
            "lpa.request_id": scope["state"]["request_id"],
        }
        if work.sequences:
            attributes |= {
                "gen_ai.request.model": self._model_name,
                "gen_ai.request.max_tokens": work.max_tokens,
                "gen_ai.request.choice.count": work.sequences,
                "gen_ai.usage.input_tokens": work.prompt_tokens,
                "gen_ai.usage.output_tokens": work.completion_tokens,
                "gen_ai.response.finish_reasons": sorted(work.reasons),
            }
            names = {"queue": "time_in_queue", "prefill": "time_in_model_prefill", "decode": "time_in_model_decode"}
            attributes |= {f"gen_ai.latency.{names[name]}": interval for name, interval in work.intervals.items()}
        span = self._tracer.start_span(
            f"{method} {route}",
            context=self._context.extract(Headers(scope=scope)),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=epoch(monotonic - seconds),
        )
        for name, began in (("queue", work.arrival), ("prefill", work.admission), ("decode", work.first_token)):
            if began is not None:
                span.add_event(name, timestamp=epoch(began))
        if status >= 500:
            span.set_attribute("error.type", str(status))
            span.set_status(Status(StatusCode.ERROR))
        span.end(wall)

    def close(self) -> None:
        """Send what waits; it takes as long as the collector does."""
        self._provider.shutdown()
