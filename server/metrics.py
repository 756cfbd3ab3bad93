"""The server's Prometheus metrics, under the names that vLLM's dashboards know with the prefix `lpa:`."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from server.engine.request import EngineStats, FinishReason

disable_created_metrics()  # a sample per counter and bucket family that is never plotted

# seconds; a small model on a CPU answers in fractions of a millisecond, a long corpus takes minutes
LATENCY_BUCKETS = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
LABEL = "model_name"


class Metrics:
    """Collectors in a registry of their own, so that two servers in a process do not share numbers."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"lpa:{name}", text, [LABEL], registry=self.registry).labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"lpa:{name}", text, [LABEL], registry=self.registry).labels(model_name)

        def histogram(name: str, text: str) -> Histogram:
            buckets = LATENCY_BUCKETS
            return Histogram(f"lpa:{name}", text, [LABEL], registry=self.registry, buckets=buckets).labels(model_name)

        self._running = gauge("num_requests_running", "Sequences that are being computed.")
        self._waiting = gauge("num_requests_waiting", "Sequences in the queue.")
        self._cache_usage = gauge("kv_cache_usage_perc", "Share of the cache's blocks in use, from 0 to 1.")
        self._prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens computed or taken from the cache.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._scored_tokens = counter("scored_tokens", "Prompt tokens whose log-probability was computed.")
        self._preemptions = counter("num_preemptions", "Sequences sent back to the queue for want of blocks.")
        self._out_of_descriptors = counter(
            "out_of_descriptors", "Seconds in which no file descriptor was left and connections were dropped."
        )
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.")
        self._inter_token = histogram("inter_token_latency_seconds", "One token to the next of a sequence.")
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to end.")
        finished = Counter(
            "lpa:request_success", "Sequences that ended.", [LABEL, "finished_reason"], registry=self.registry
        )
        self._build_info = Gauge(
            "lpa:build_info",
            "1; the version, and what computes.",
            [LABEL, "version", "backend", "batch_invariant"],
            registry=self.registry,
        )
        self._model_name = model_name
        self._finished = {reason: finished.labels(model_name, reason.value) for reason in FinishReason}

    def set_build_info(self, version: str, backend: str, batch_invariant: bool) -> None:
        """Said once, when the model is loaded."""
        self._build_info.labels(self._model_name, version, backend, str(batch_invariant).lower()).set(1)

    def observe(self, stats: EngineStats) -> None:
        """Take in one report of the engine."""
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._cache_usage.set(stats.kv_cache_usage)
        self._prefix_queries.inc(stats.prefix_cache_queries)
        self._prefix_hits.inc(stats.prefix_cache_hits)
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._generation_tokens.inc(stats.generation_tokens)
        self._scored_tokens.inc(stats.scored_tokens)
        self._preemptions.inc(stats.preemptions)
        for seconds in stats.time_to_first_token:
            self._ttft.observe(seconds)
        for seconds in stats.inter_token_latency:
            self._inter_token.observe(seconds)
        for request in stats.finished:
            self._finished[request.reason].inc()
            self._e2e.observe(request.e2e)

    def count_out_of_descriptors(self) -> None:
        """To be called once for each second without a free descriptor."""
        self._out_of_descriptors.inc()

    def render(self) -> bytes:
        """The page in Prometheus' text format, version 0.0.4."""
        return generate_latest(self.registry)
