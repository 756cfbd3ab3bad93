"""Traces, as a collector of OpenTelemetry receives them over HTTP."""

from __future__ import annotations

import gzip
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from lpa_model.config import Architecture
from tests.serving import serving, slow_steps, until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(ThreadingHTTPServer):
    """Keeps the requests that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.received: list[ExportTraceServiceRequest] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    def spans(self) -> list[Any]:
        resources = [spans for request in list(self.received) for spans in request.resource_spans]
        return [span for spans in resources for scope in spans.scope_spans for span in scope.spans]

    def span(self, name: str) -> Any:
        until(lambda: any(span.name == name for span in self.spans()))
        return next(span for span in self.spans() if span.name == name)


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert isinstance(self.server, Collector)
        self.server.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds between batches
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def attributes(span: Any) -> dict[str, Any]:
    kinds = {entry.key: entry.value for entry in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in kinds.items()}


def test_a_request_is_a_span_under_the_clients_with_its_phases(
    collector: Collector, tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.time_ns()
    with serving(tiny_checkpoints["setting2"], otlp_traces_endpoint=collector.url) as served:
        slow_steps(served, monkeypatch, 0.02)
        served.client.headers["traceparent"] = f"00-{TRACE}-{PARENT}-01"
        served.client.headers["x-request-id"] = "mine"
        served.complete(prompt="abc", max_tokens=5, n=2, ignore_eos=True)
        span = collector.span("POST /v1/completions")
        served.client.get("/health")
        served.client.get("/metrics")
        assert served.client.get("/nothing/here").status_code == 404
        lost = collector.span("GET other")
    assert {each.name for each in collector.spans()} == {"POST /v1/completions", "GET other"}  # no probes
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.kind == span.SPAN_KIND_SERVER
    assert [event.name for event in span.events] == ["queue", "prefill", "decode"]
    instants = [event.time_unix_nano for event in span.events]
    assert began <= span.start_time_unix_nano <= instants[0] <= instants[1] <= instants[2] <= span.end_time_unix_nano
    assert instants[2] - instants[1] >= 20e6  # a step
    assert span.end_time_unix_nano - instants[2] >= 4 * 20e6
    found = attributes(span)
    assert found["http.route"] == "/v1/completions"
    assert found["http.response.status_code"] == 200
    assert found["lpa.request_id"] == "mine"
    assert found["gen_ai.usage.input_tokens"] == 3
    assert found["gen_ai.usage.output_tokens"] == 10
    assert found["gen_ai.latency.time_in_model_decode"] >= 4 * 0.02
    assert [value.string_value for value in found["gen_ai.response.finish_reasons"].values] == ["length"]
    assert "gen_ai.usage.input_tokens" not in attributes(lost)
    (resource,) = {
        entry.value.string_value
        for request in collector.received
        for spans in request.resource_spans
        for entry in spans.resource.attributes
        if entry.key == "service.name"
    }
    assert resource == "lpa"


def test_a_client_that_samples_nothing_is_not_traced(
    collector: Collector, tiny_checkpoints: dict[Architecture, Path]
) -> None:
    with serving(tiny_checkpoints["setting2"], otlp_traces_endpoint=collector.url) as served:
        served.client.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
        served.client.get("/version", headers={"traceparent": "no such thing"})  # begins a trace of its own
        assert len(collector.span("GET /version").trace_id) == 16
    assert [span.name for span in collector.spans()] == ["GET /version"]


def test_without_a_collector_requests_are_served_and_the_server_ends(
    tiny_checkpoints: dict[Architecture, Path],
) -> None:
    with serving(tiny_checkpoints["setting2"], otlp_traces_endpoint="http://127.0.0.1:9/v1/traces") as served:
        assert served.complete(prompt="abc", max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2
        began = time.monotonic()
    assert time.monotonic() - began < 60


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tiny_checkpoints: dict[Architecture, Path]) -> None:
    monkeypatch.setitem(sys.modules, "server.tracing", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with (
        pytest.raises(ValueError, match=r"otlp_traces_endpoint: .*lpa-server\[otel\]"),
        serving(tiny_checkpoints["setting2"], otlp_traces_endpoint="http://127.0.0.1:9/v1/traces"),
    ):
        pass
