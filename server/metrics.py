"""The server's Prometheus metrics, under vLLM's names with the prefix `lpa:`, or, for its dashboards, its own.

What is observed is added to plain numbers, a fraction of a microsecond each; the page is made of them when it is read.
`observe...`, `set...` and `count...` belong to the event loop's thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from server.engine.block_manager import BlockManager
from server.engine.engine import BackendInfo
from server.engine.request import HELD_BY, EngineStats, FinishedRequest, FinishReason

# seconds; a small model on a CPU answers in fractions of a millisecond, a long corpus takes minutes
LATENCY_BUCKETS = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
TOKEN_BUCKETS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))  # of a sequence
STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # tokens, as vLLM's
CHOICE_BUCKETS = (1, 2, 5, 10, 20)

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

Prefix = Literal["lpa", "vllm"]


def render(collector: Collector, accept: str = "") -> tuple[bytes, str]:
    """The page, and its content type: Prometheus' text format, or OpenMetrics for an Accept header with it.

    From any thread: it takes several milliseconds.
    """
    if "application/openmetrics-text" not in accept:
        return generate_latest(collector), CONTENT_TYPE_PLAIN_0_0_4
    # the library's other ways of escaping make underscores of the colons in samples' names
    return openmetrics.generate_latest(collector, escaping=openmetrics.ALLOWUTF8), OPENMETRICS


class Histogram:
    """Counts of values by bucket, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last: above all bounds
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value in the first bucket whose bound it does not exceed."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        """A series of a family, with the counts up to each bound as Prometheus has them."""
        buckets, below = [], 0
        for bound, count in zip((*map(float, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            buckets.append((str(bound), below))
        family.add_metric(labels, buckets, self.total)


class Metrics(Collector):
    """One server's numbers, in a registry of their own. `collect` is the list of all metrics."""

    def __init__(self, model_name: str, prefix: Prefix = "lpa") -> None:
        self._prefix = prefix
        # vLLM counts its engines; dashboards for several of them sum over this label
        self._labels = {"model_name": model_name, **({"engine": "0"} if prefix == "vllm" else {})}
        self._state = EngineStats()
        self._sums: Counter[str] = Counter()
        self._finished = Counter[FinishReason]()
        self._held = Counter(dict.fromkeys(HELD_BY, 0))
        self._out_of_descriptors = 0
        self._build: dict[str, str] | None = None
        self._cache: dict[str, str] = {}
        self._load_seconds = 0.0
        self._tasks = 0
        self._http = Counter[tuple[str, str, str]]()  # (route, method, status)
        self._http_seconds: dict[tuple[str, str], Histogram] = {}  # by (route, method)
        self._batches: dict[str, int] = {}  # by status
        self._batch_lines_waiting = 0
        self._callers: dict[str, Counter[str]] = {}  # by the name of a key
        self._ttft = Histogram(LATENCY_BUCKETS)
        self._inter_token = Histogram(LATENCY_BUCKETS)
        self._per_token = Histogram(LATENCY_BUCKETS)
        self._e2e = Histogram(LATENCY_BUCKETS)
        self._queue = Histogram(LATENCY_BUCKETS)
        self._prefill = Histogram(LATENCY_BUCKETS)
        self._decode = Histogram(LATENCY_BUCKETS)
        self._inference = Histogram(LATENCY_BUCKETS)
        self._loop_lag = Histogram(LATENCY_BUCKETS)
        self._prompt_length = Histogram(TOKEN_BUCKETS)
        self._generation_length = Histogram(TOKEN_BUCKETS)
        self._longest_generation = Histogram(TOKEN_BUCKETS)
        self._max_tokens = Histogram(TOKEN_BUCKETS)
        self._choices = Histogram(CHOICE_BUCKETS)
        self._step_tokens = Histogram(STEP_BUCKETS)
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.registry.register(self)

    def set_engine(self, version: str, backend: BackendInfo, blocks: BlockManager) -> None:
        """Said once, when the model is loaded."""
        self._build = {
            "version": version,
            "backend": backend.name,
            "dtype": backend.types,
            "layout": backend.layout,
            "weights_hash": backend.weights_hash,
            "batch_invariant": str(backend.batch_invariant).lower(),
        }
        self._cache = {
            "block_size": str(blocks.block_size),
            "num_gpu_blocks": str(blocks.num_blocks),
            "enable_prefix_caching": str(blocks.enable_prefix_caching),
        }
        self._load_seconds = backend.load_seconds

    def observe(self, stats: EngineStats) -> None:
        """Take in one report of the engine."""
        sums = self._sums
        self._state = stats
        sums["prefix_queries"] += stats.prefix_cache_queries
        sums["prefix_hits"] += stats.prefix_cache_hits
        sums["prompt_tokens"] += stats.prompt_tokens
        sums["generation_tokens"] += stats.generation_tokens
        sums["scored_tokens"] += stats.scored_tokens
        sums["preemptions"] += stats.preemptions
        sums["steps_ahead"] += stats.steps_ahead
        sums["steps_synchronous"] += stats.steps - stats.steps_ahead
        sums["discarded_tokens"] += stats.discarded_tokens
        if stats.held:
            self._held.update(stats.held)
        if stats.step_tokens:
            self._step_tokens.observe(stats.step_tokens)
        for seconds in stats.time_to_first_token:
            self._ttft.observe(seconds)
        for seconds in stats.inter_token_latency:
            self._inter_token.observe(seconds)
        for request in stats.finished:
            self._observe_finished(request)
        for n, longest in stats.finished_prompts:
            self._choices.observe(n)
            self._longest_generation.observe(longest)

    def _observe_finished(self, request: FinishedRequest) -> None:
        self._finished[request.reason] += 1
        self._e2e.observe(request.e2e)
        self._queue.observe(request.queue)
        self._prompt_length.observe(request.num_prompt_tokens)
        self._generation_length.observe(request.num_generation_tokens)
        self._max_tokens.observe(request.max_tokens)
        for histogram, seconds in (
            (self._prefill, request.prefill),
            (self._decode, request.decode),
            (self._inference, request.inference),
            (self._per_token, request.time_per_output_token),
        ):
            if seconds is not None:
                histogram.observe(seconds)

    def observe_http(self, route: str, method: str, status: int, seconds: float) -> None:
        """An HTTP request that has been answered; `route` must be one of the application's or a word for none."""
        self._http[route, method, str(status)] += 1
        self._http_seconds.setdefault((route, method), Histogram(LATENCY_BUCKETS)).observe(seconds)

    def observe_caller(self, name: str, prompt_tokens: int, generation_tokens: int) -> None:
        """What a request used that came with a key of that name."""
        used = self._callers.setdefault(name, Counter())
        used.update(requests=1, prompt_tokens=prompt_tokens, generation_tokens=generation_tokens)

    def count_batch_lines(self, completed: int, failed: int) -> None:
        """Lines of batches that were answered, and such that failed."""
        self._sums["lines_completed"] += completed
        self._sums["lines_failed"] += failed

    def set_batches(self, by_status: dict[str, int], lines_waiting: int) -> None:
        """What the server keeps: its batches, and the lines of those under way that have no answer yet."""
        self._batches, self._batch_lines_waiting = by_status, lines_waiting

    def observe_loop_lag(self, seconds: float) -> None:
        """How much later than planned the event loop has come to a task."""
        self._loop_lag.observe(seconds)

    def set_tasks(self, count: int) -> None:
        """How many tasks the event loop has."""
        self._tasks = count

    def count_out_of_descriptors(self) -> None:
        """To be called once for each second without a free descriptor."""
        self._out_of_descriptors += 1

    def collect(self) -> Iterator[Metric]:
        """Every metric of the server, from any thread. Those of the process are prometheus_client's."""
        state, sums = self._state, self._sums
        yield self._gauge("num_requests_running", "Sequences that are being computed.", state.num_running)
        yield self._gauge("num_requests_waiting", "Sequences in the queue.", state.num_waiting)
        ready = state.num_waiting - state.num_deferred
        yield self._by(
            GaugeMetricFamily,
            "num_requests_waiting_by_reason",
            "Sequences in the queue, by reason: they wait for a place or blocks (capacity), or for a prompt that "
            "another one is computing (deferred).",
            "reason",
            {"capacity": ready, "deferred": state.num_deferred},
        )
        yield self._gauge(
            "kv_cache_usage_perc", "Share of the cache's blocks in use, from 0 to 1.", state.kv_cache_usage
        )
        yield self._info(
            "cache_config_info",
            "1; labels: block_size, num_gpu_blocks (blocks of the cache, on a CPU too), enable_prefix_caching.",
            self._cache,
        )
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", sums["prefix_queries"]
        )
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", sums["prefix_hits"])
        yield self._counter("prompt_tokens", "Prompt tokens computed or taken from the cache.", sums["prompt_tokens"])
        yield self._counter("prompt_tokens_cached", "Prompt tokens taken from the cache.", sums["prefix_hits"])
        yield self._counter("generation_tokens", "Tokens generated.", sums["generation_tokens"])
        yield self._counter("scored_tokens", "Prompt tokens whose log-probability was computed.", sums["scored_tokens"])
        yield self._counter(
            "num_preemptions", "Sequences sent back to the queue for want of blocks.", sums["preemptions"]
        )
        yield self._histogram("iteration_tokens_total", "Tokens of a step.", self._step_tokens)
        yield self._by(
            CounterMetricFamily,
            "engine_steps",
            "Steps, by mode: the next one was submitted before their results came (ahead), or after (synchronous).",
            "mode",
            {mode: sums[f"steps_{mode}"] for mode in ("ahead", "synchronous")},
        )
        yield self._by(
            CounterMetricFamily,
            "held_tokens",
            "Generated tokens that no step could take ahead of the host, by the parameter that needs to know them.",
            "reason",
            self._held,
        )
        yield self._counter(
            "discarded_tokens",
            "Tokens computed one step ahead for sequences that had ended.",
            sums["discarded_tokens"],
        )
        yield self._by(
            CounterMetricFamily,
            "request_success",
            "Sequences that ended, by finished_reason.",
            "finished_reason",
            {reason.value: self._finished[reason] for reason in FinishReason},
        )
        yield self._histogram("time_to_first_token_seconds", "Arrival to first token.", self._ttft)
        yield self._histogram("inter_token_latency_seconds", "One token to the next of a sequence.", self._inter_token)
        yield self._histogram(
            "time_per_output_token_seconds", "inter_token_latency_seconds by its older name.", self._inter_token
        )
        yield self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time from one token to the next, of sequences of two tokens or more.",
            self._per_token,
        )
        yield self._histogram("e2e_request_latency_seconds", "Arrival to end.", self._e2e)
        yield self._histogram("request_queue_time_seconds", "Arrival to the first step.", self._queue)
        yield self._histogram(
            "request_prefill_time_seconds", "First step to first token, or to the end of scoring.", self._prefill
        )
        yield self._histogram("request_decode_time_seconds", "First token to last.", self._decode)
        yield self._histogram("request_inference_time_seconds", "First step to last token.", self._inference)
        yield self._histogram("request_prompt_tokens", "Prompt tokens of a sequence.", self._prompt_length)
        yield self._histogram("request_generation_tokens", "Tokens a sequence generated.", self._generation_length)
        yield self._histogram(
            "request_max_num_generation_tokens",
            "Tokens of the longest of a prompt's sequences.",
            self._longest_generation,
        )
        yield self._histogram("request_params_max_tokens", "max_tokens of a sequence.", self._max_tokens)
        yield self._histogram("request_params_n", "Sequences of a prompt (n or best_of).", self._choices)
        yield self._info(
            "build_info", "1; labels: version, backend, dtype, layout, weights_hash, batch_invariant.", self._build
        )
        yield self._gauge("model_load_time_seconds", "From the start until the model was loaded.", self._load_seconds)
        yield self._http_requests()
        yield self._http_latency()
        yield self._used_by_key("requests", "HTTP requests, by the name of their key.")
        yield self._used_by_key("prompt_tokens", "Prompt tokens, by the name of their request's key.")
        yield self._used_by_key("generation_tokens", "Tokens generated, by the name of their request's key.")
        yield self._by(
            CounterMetricFamily,
            "batch_lines",
            "Lines of batches, by status: completed, or failed (in the error file).",
            "status",
            {status: sums[f"lines_{status}"] for status in ("completed", "failed")},
        )
        yield self._by(
            GaugeMetricFamily, "batches", "Batches that the server keeps, by status.", "status", self._batches
        )
        yield self._gauge("batch_lines_waiting", "Lines of batches that have no answer yet.", self._batch_lines_waiting)
        yield self._histogram("event_loop_lag_seconds", "How much late the event loop came to a task.", self._loop_lag)
        yield self._gauge(
            "event_loop_tasks",
            "Tasks of the event loop: a few of the server, and some of each request in progress.",
            self._tasks,
        )
        yield self._counter(
            "out_of_descriptors",
            "Seconds in which no file descriptor was left and connections were dropped.",
            self._out_of_descriptors,
        )
        if self._prefix == "vllm":
            yield from self._older_names()

    def _older_names(self) -> Iterator[Metric]:
        """Of vLLM, for older dashboards and routers."""
        queries, hits = self._sums["prefix_queries"], self._sums["prefix_hits"]
        yield self._gauge("gpu_cache_usage_perc", "kv_cache_usage_perc by its older name.", self._state.kv_cache_usage)
        yield self._counter("gpu_prefix_cache_queries", "prefix_cache_queries by its older name.", queries)
        yield self._counter("gpu_prefix_cache_hits", "prefix_cache_hits by its older name.", hits)
        yield self._gauge(
            "gpu_prefix_cache_hit_rate", "Share of hits in prefix_cache_queries.", hits / queries if queries else 0.0
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"{self._prefix}:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(f"{self._prefix}:{name}", text, labels=list(self._labels))
        histogram.add_to(family, list(self._labels.values()))
        return family

    def _info(self, name: str, text: str, labels: dict[str, str] | None) -> Metric:
        """A gauge that is 1 once the labels are known."""
        known = {**self._labels, **(labels or {})}
        family = GaugeMetricFamily(f"{self._prefix}:{name}", text, labels=list(known))
        if labels:
            family.add_metric(list(known.values()), 1)
        return family

    def _by(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        label: str,
        values: Mapping[str, float],
    ) -> Metric:
        """A gauge or a counter with a sample for each value of one more label."""
        family = kind(f"{self._prefix}:{name}", text, labels=[*self._labels, label])
        for value, number in values.items():
            family.add_metric([*self._labels.values(), value], number)
        return family

    def _used_by_key(self, what: str, text: str) -> Metric:
        used = {name: counts[what] for name, counts in list(self._callers.items())}
        return self._by(CounterMetricFamily, f"key_{what}", text, "key", used)

    def _http_name(self, name: str) -> str:
        """vLLM has these from a library, without its prefix."""
        return name if self._prefix == "vllm" else f"{self._prefix}:{name}"

    def _http_requests(self) -> Metric:
        labels = [*self._labels, "handler", "method", "status"]
        family = CounterMetricFamily(
            self._http_name("http_requests"),
            "HTTP requests, by route (handler), method and status; what no route took is `other`.",
            labels=labels,
        )
        counts: Counter[tuple[str, str, str]] = Counter()
        for (route, method, status), count in list(self._http.items()):
            counts[route, method, f"{status[0]}xx" if self._prefix == "vllm" else status] += count
        for key, count in counts.items():
            family.add_metric([*self._labels.values(), *key], count)
        return family

    def _http_latency(self) -> Metric:
        labels = [*self._labels, "handler", "method"]
        family = HistogramMetricFamily(
            self._http_name("http_request_duration_seconds"),
            "Head of an HTTP request to the end of its answer, by handler and method.",
            labels=labels,
        )
        for key, histogram in list(self._http_seconds.items()):
            histogram.add_to(family, [*self._labels.values(), *key])
        return family
