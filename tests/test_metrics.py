from __future__ import annotations

import gzip
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from lpa_model.config import Architecture
from server.engine.request import HELD_BY, EngineStats, FinishedRequest, FinishReason
from server.metrics import Histogram, Metrics, render
from tests.serving import Served, serving, slow_steps, until


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The page as Prometheus' own parser reads it, without the label model_name, which every lpa: sample must have."""
    found = {}
    for family in text_string_to_metric_families(render(metrics.registry)[0].decode()):
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


def ended(reason: FinishReason = FinishReason.STOP, **changes: Any) -> FinishedRequest:
    """A sequence that came at 0 and never ran, but for the changes."""
    default = {"choice": 0, "num_prompt_tokens": 3, "num_cached_tokens": 0, "num_generation_tokens": 0, "max_tokens": 7}
    instants = {"arrival": 0.0, "admission": None, "first_token": None, "last_token": None, "end": 1.0}
    return FinishedRequest(reason=reason, **{**default, **instants, **changes})


def test_gauges_show_the_last_report_and_counters_the_sum() -> None:
    metrics = Metrics("tiny")
    counters = {
        "prefix_cache_queries": "prefix_cache_queries",
        "prefix_cache_hits": "prefix_cache_hits",
        "prompt_tokens": "prompt_tokens",
        "generation_tokens": "generation_tokens",
        "scored_tokens": "scored_tokens",
        "preemptions": "num_preemptions",
        "discarded_tokens": "discarded_tokens",
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


def test_steps_are_counted_by_mode_and_held_tokens_by_reason() -> None:
    metrics = Metrics("tiny")
    metrics.observe(stats(steps=3, steps_ahead=2, held={"grammar": 4}))
    metrics.observe(stats(steps=1, held={"grammar": 1, "penalties": 2}))
    steps = {mode: value(metrics, "lpa:engine_steps_total", mode=mode) for mode in ("ahead", "synchronous")}
    assert steps == {"ahead": 2, "synchronous": 2}
    held = {reason: value(metrics, "lpa:held_tokens_total", reason=reason) for reason in HELD_BY}
    assert held == {"grammar": 5, "penalties": 2, "bad_words": 0}


def test_requests_are_counted_by_the_reason_they_ended_for() -> None:
    metrics = Metrics("tiny")

    metrics.observe(stats(finished=[ended(FinishReason.STOP, end=0.5), ended(FinishReason.ABORT, end=1.0)]))
    metrics.observe(stats(finished=[ended(FinishReason.STOP, end=0.25)]))
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


def test_a_sequence_that_ended_is_in_the_histograms_of_what_it_had() -> None:
    metrics = Metrics("tiny")
    whole = ended(num_generation_tokens=5, admission=0.25, first_token=1.25, last_token=3.25, end=3.5)
    scored = ended(FinishReason.LENGTH, max_tokens=0, admission=0.5, first_token=2.5, end=2.5)
    never_ran = ended(FinishReason.ABORT, end=4.0)
    cut_off = ended(FinishReason.ABORT, admission=1.0, end=6.0)
    metrics.observe(stats(finished=[whole, scored, never_ran, cut_off], finished_prompts=[(1, 5), (3, 9)]))

    def found(name: str) -> tuple[float, float]:
        return value(metrics, f"lpa:{name}_count"), value(metrics, f"lpa:{name}_sum")

    assert found("request_queue_time_seconds") == (4, 0.25 + 0.5 + 4.0 + 1.0)
    assert found("request_prefill_time_seconds") == (2, 1.0 + 2.0)
    assert found("request_decode_time_seconds") == (1, 2.0)
    assert found("request_inference_time_seconds") == (2, 3.0 + 2.0)
    assert found("request_time_per_output_token_seconds") == (1, 0.5)
    assert found("e2e_request_latency_seconds") == (4, 3.5 + 2.5 + 4.0 + 6.0)
    assert found("request_prompt_tokens") == (4, 12)
    assert found("request_generation_tokens") == (4, 5)
    assert found("request_params_max_tokens") == (4, 21)
    assert found("request_params_n") == (2, 4)
    assert found("request_max_num_generation_tokens") == (2, 14)


def test_the_step_and_the_reasons_to_wait_are_on_the_page() -> None:
    metrics = Metrics("tiny")
    metrics.observe(stats(num_waiting=5, num_deferred=2, step_tokens=9))
    metrics.observe(stats(num_waiting=5, num_deferred=2))  # nothing ran
    assert value(metrics, "lpa:num_requests_waiting_by_reason", reason="capacity") == 3
    assert value(metrics, "lpa:num_requests_waiting_by_reason", reason="deferred") == 2
    assert value(metrics, "lpa:iteration_tokens_total_count") == 1
    assert value(metrics, "lpa:iteration_tokens_total_bucket", le="8.0") == 0
    assert value(metrics, "lpa:iteration_tokens_total_bucket", le="16.0") == 1


@pytest.mark.parametrize("where", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_a_value_counts_in_every_bucket_whose_bound_it_does_not_exceed(where: float) -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(where)
    assert histogram.counts == [where <= 1, 1 < where <= 2, where > 2]


# as vLLM 0.2x writes them: what its published dashboards, its production stack and AIBrix ask for
VLLM = {
    *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc"),
    *("cache_config_info", "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total"),
    *("prompt_tokens_total", "prompt_tokens_cached_total", "generation_tokens_total", "request_success_total"),
    *("gpu_cache_usage_perc", "gpu_prefix_cache_hit_rate"),
    *("gpu_prefix_cache_hits_total", "gpu_prefix_cache_queries_total"),
}
VLLM_HISTOGRAMS = {
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds"),
    *("request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds"),
    *("request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens"),
    *("request_params_max_tokens", "request_params_n", "iteration_tokens_total"),
}


def test_with_the_prefix_vllm_names_are_vllms_and_no_others() -> None:
    metrics = Metrics("tiny", "vllm")
    metrics.observe(stats(prefix_cache_queries=8, prefix_cache_hits=2, kv_cache_usage=0.5))
    metrics.observe_http("/v1/completions", "POST", 404, 0.1)
    page = render(metrics.registry)[0].decode()
    parts = {f"{name}{part}" for name in VLLM_HISTOGRAMS for part in ("_bucket", "_count", "_sum")}
    found = {sample.name: sample for family in text_string_to_metric_families(page) for sample in family.samples}
    assert {f"vllm:{name}" for name in parts | VLLM - {"cache_config_info"}} <= set(found)
    assert not [name for name in found if name.startswith("lpa")]
    assert found["vllm:gpu_prefix_cache_hit_rate"].value == 0.25
    assert found["vllm:gpu_cache_usage_perc"].value == 0.5
    assert found["vllm:gpu_cache_usage_perc"].labels == {"model_name": "tiny", "engine": "0"}
    assert found["http_requests_total"].labels.items() >= {"handler": "/v1/completions", "status": "4xx"}.items()


def test_openmetrics_says_the_same_as_the_text_format() -> None:
    metrics = Metrics("tiny")
    metrics.observe(stats(generation_tokens=5, time_to_first_token=[0.3], finished=[ended()]))
    metrics.observe_http("/v1/completions", "POST", 200, 0.1)
    page, content_type = render(
        metrics.registry, "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4"
    )
    assert content_type == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert page.endswith(b"# EOF\n")

    def ours(families: Any) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith("lpa:")
        }

    text, plain_type = render(metrics.registry, "text/plain")
    assert plain_type == "text/plain; version=0.0.4; charset=utf-8"
    expected = ours(text_string_to_metric_families(text.decode()))
    assert len(expected) > 300
    assert ours(openmetrics_families(page.decode())) == expected


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as found:
        yield found


def test_a_scrape_may_be_compressed(served: Served) -> None:
    plain = served.client.get("/metrics", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    with served.client.stream("GET", "/metrics", headers={"accept-encoding": "br, gzip;q=0.5"}) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == "gzip"
    assert len(raw) < len(plain.content) / 4
    assert b"lpa:build_info{" in gzip.decompress(raw)
    refused = served.client.get("/metrics", headers={"accept-encoding": "gzip;q=0, identity"})
    assert "content-encoding" not in refused.headers


def test_what_a_request_took_is_counted_once_for_each_sequence(served: Served) -> None:
    names = ("queue_time_seconds", "prefill_time_seconds", "decode_time_seconds", "params_n", "params_max_tokens")
    counts = {name: f'lpa:request_{name}_count{{model_name="tiny"}}' for name in names}
    before = {name: served.metric(sample) for name, sample in counts.items()}
    sum_before = served.metric('lpa:request_params_n_sum{model_name="tiny"}')
    served.complete(prompt="abc", max_tokens=4, n=3, ignore_eos=True)
    assert served.post("/v1/perplexity", input="abcabc").status_code == 200
    gained = {name: served.metric(sample) - before[name] for name, sample in counts.items()}
    assert gained == {
        "queue_time_seconds": 4,
        "prefill_time_seconds": 4,
        "decode_time_seconds": 3,  # scoring has none
        "params_n": 2,
        "params_max_tokens": 4,
    }
    assert served.metric('lpa:request_params_n_sum{model_name="tiny"}') - sum_before == 3 + 1


def test_time_in_the_queue_is_what_a_request_waited(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"], max_num_seqs=1) as served:
        slow_steps(served, monkeypatch, 0.02)
        served.complete(prompt="abc", max_tokens=5, n=2, ignore_eos=True)  # the second waits for the first
        queue, decode = (
            served.metric(f'lpa:request_{x}_time_seconds_sum{{model_name="tiny"}}') for x in ("queue", "decode")
        )
        assert queue >= 4 * 0.02
        assert decode >= 2 * 4 * 0.02


def test_http_requests_are_counted_by_route_and_never_by_what_clients_write(served: Served) -> None:
    served.client.get("/never/heard/of")
    served.client.request("BREW", "/v1/models")
    served.client.post("/v1/requests/some-id/cancel")
    served.client.head("/health")
    served.client.get("/v1/models", headers={f"x-{i}": "1" for i in range(200)})

    def count(handler: str, method: str, status: int) -> float:
        labels = f'handler="{handler}",method="{method}",model_name="tiny",status="{status}"'
        return served.metric(f"lpa:http_requests_total{{{labels}}}")

    assert count("other", "GET", 404) >= 1
    assert count("/v1/models", "other", 405) >= 1
    assert count("/v1/requests/{request_id}/cancel", "POST", 403) >= 1
    assert count("/health", "HEAD", 200) >= 1
    assert count("other", "GET", 431) >= 1
    assert "never" not in served.client.get("/metrics").text


def test_the_model_and_the_cache_are_described(served: Served) -> None:
    page = served.client.get("/metrics").text
    (build,) = re.findall(r"^lpa:build_info\{(.*)\} 1\.0$", page, re.MULTILINE)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', build))
    assert labels["dtype"] == "float32"
    assert labels["backend"] == served.engine.backend.name
    assert labels["layout"] in ("latent", "mixed", "full")
    assert re.fullmatch("[0-9a-f]{12}", labels["weights_hash"])
    assert labels["weights_hash"] in served.engine.fingerprint
    blocks = served.engine.scheduler.blocks.num_blocks
    assert (
        f'cache_config_info{{block_size="32",enable_prefix_caching="True",model_name="tiny",num_gpu_blocks="{blocks}"}}'
        in page
    )
    assert served.metric('lpa:model_load_time_seconds{model_name="tiny"}') > 0


def test_an_event_loop_that_is_held_up_is_seen(served: Served) -> None:

    loop = served.server._loop
    assert loop is not None
    late = 'lpa:event_loop_lag_seconds_bucket{le="0.25",model_name="tiny"}'
    whole = 'lpa:event_loop_lag_seconds_count{model_name="tiny"}'
    before = served.metric(whole) - served.metric(late)
    loop.call_soon_threadsafe(time.sleep, 0.5)
    until(lambda: served.metric(whole) - served.metric(late) > before)
