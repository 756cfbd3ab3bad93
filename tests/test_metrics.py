from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.engine.request import EngineStats, FinishedRequest, FinishReason
from server.metrics import Metrics


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The page as Prometheus' own parser reads it, without the label model_name, which every lpa: sample must have."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("lpa:"):
                assert labels.pop("model_name") == "tiny"
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


def stats(**changes: object) -> EngineStats:
    report = EngineStats()
    for name, changed in changes.items():
        setattr(report, name, changed)
    return report


def test_gauges_show_the_last_report_and_counters_the_sum() -> None:
    metrics = Metrics("tiny")
    counters = {
        "prefix_cache_queries": "prefix_cache_queries",
        "prefix_cache_hits": "prefix_cache_hits",
        "prompt_tokens": "prompt_tokens",
        "generation_tokens": "generation_tokens",
        "scored_tokens": "scored_tokens",
        "preemptions": "num_preemptions",
    }
    gauges = {
        "num_running": "num_requests_running",
        "num_waiting": "num_requests_waiting",
        "kv_cache_usage": "kv_cache_usage_perc",
    }
    first = {name: 10 * i + 1 for i, name in enumerate([*counters, *gauges])}
    second = {name: 3 for name in first}
    metrics.observe(stats(**first))
    metrics.observe(stats(**second))
    for field, name in counters.items():
        assert value(metrics, f"lpa:{name}_total") == first[field] + 3
    for name in gauges.values():
        assert value(metrics, f"lpa:{name}") == 3


def test_requests_are_counted_by_the_reason_they_ended_for() -> None:
    metrics = Metrics("tiny")

    def ended(reason: FinishReason, e2e: float) -> FinishedRequest:
        return FinishedRequest(reason=reason, num_prompt_tokens=3, num_generation_tokens=2, e2e=e2e)

    metrics.observe(stats(finished=[ended(FinishReason.STOP, 0.5), ended(FinishReason.ABORT, 1.0)]))
    metrics.observe(stats(finished=[ended(FinishReason.STOP, 0.25)]))
    by_reason = {r.value: value(metrics, "lpa:request_success_total", finished_reason=r.value) for r in FinishReason}
    assert by_reason == {"stop": 2, "length": 0, "abort": 1, "error": 0}
    assert value(metrics, "lpa:e2e_request_latency_seconds_count") == 3
    assert value(metrics, "lpa:e2e_request_latency_seconds_sum") == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("field", "name"),
    [("time_to_first_token", "time_to_first_token_seconds"), ("inter_token_latency", "inter_token_latency_seconds")],
)
def test_latencies_fall_into_buckets_from_a_quarter_of_a_millisecond(field: str, name: str) -> None:
    metrics = Metrics("tiny")
    metrics.observe(stats(**{field: [0.0002, 0.0004, 0.3]}))
    assert value(metrics, f"lpa:{name}_count") == 3
    assert value(metrics, f"lpa:{name}_bucket", le="0.00025") == 1
    assert value(metrics, f"lpa:{name}_bucket", le="0.0005") == 2
    bounds = sorted(float(dict(labels)["le"]) for n, labels in samples(metrics) if n == f"lpa:{name}_bucket")
    assert bounds[0] == 0.00025
    assert bounds[-1] == float("inf")


def test_two_servers_in_a_process_do_not_share_numbers() -> None:
    one, other = Metrics("tiny"), Metrics("tiny")
    one.observe(stats(generation_tokens=5))
    assert value(other, "lpa:generation_tokens_total") == 0


def test_the_process_and_the_interpreter_are_on_the_page() -> None:
    names = {name for name, _ in samples(Metrics("tiny"))}
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "python_info"} <= names
