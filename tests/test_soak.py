"""What a soak concludes from what it has seen; the soak itself is `make soak`, and extra/test_soak.py its
shortest."""

from __future__ import annotations

from collections import Counter

import pytest

from server.metrics import Metrics, render
from tests.soak import checks
from tests.soak.driver import LEFT, Handler, route_of
from tests.soak.machine import samples, total

POST = ("/v1/completions", "POST")


def test_memory_that_grows_is_told_from_memory_that_sways() -> None:
    sways = [(float(t), 400_000_000 + 5_000_000 * (t % 2)) for t in range(420)]
    grows = [(t, size + int(t * 1e5)) for t, size in sways]
    assert checks.memory(sways).passed
    assert not checks.memory(grows).passed
    assert checks.slope([(t, size - 400e6) for t, size in grows]) == pytest.approx(1e5, rel=0.02)
    early = [(t, size + int(1e6 * min(t, 60))) for t, size in sways]  # what settles is no leak
    assert checks.memory(early).passed
    assert "after 50 s" in checks.memory(sways[:101]).name
    for few in (1, 2):
        short = checks.memory(sways[:few])
        assert not short.passed and "too short" in short.found


def test_counts_differ_where_one_has_more_than_the_other() -> None:
    mine: Counter[Handler] = Counter({(*POST, "200"): 5, (*POST, LEFT): 2, (*POST, "429"): 3})
    theirs: Counter[Handler] = Counter({(*POST, "200"): 5, (*POST, "499"): 1, (*POST, "429"): 4})
    scraped: Counter[Handler] = Counter({("/metrics", "GET", "200"): 9})
    assert checks.differences(mine, theirs + scraped) == []
    assert checks.differences(mine, theirs + Counter({(*POST, "500"): 1})) == [
        "/v1/completions POST 500: 0 sent, 1 counted"
    ]
    assert checks.differences(mine, theirs - Counter({(*POST, "499"): 1})) == [
        "/v1/completions POST: 1 requests are not counted"
    ]
    assert checks.differences(mine, theirs - Counter({(*POST, "429"): 2}))[0] == (
        "/v1/completions POST 429: 3 sent, 2 counted"
    )


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/files", "/v1/files"),
        ("/v1/files/file-output-12ab/content", "/v1/files/{file_id}/content"),
        ("/v1/batches/batch_12ab/cancel", "/v1/batches/{batch_id}/cancel"),
        ("/v1/requests/cancel-7/cancel", "/v1/requests/{request_id}/cancel"),
        ("/v1/perplexity?stream=true", "/v1/perplexity"),
    ],
)
def test_paths_are_counted_under_the_routes_of_the_server(path: str, route: str) -> None:
    assert route_of(path) == route


def test_a_page_of_metrics_is_read() -> None:
    metrics = Metrics("tiny")
    metrics.observe_http("/v1/completions", "POST", 200, 0.1)
    metrics.observe_http("/v1/completions", "POST", 429, 0.1)
    page = samples(render(metrics.registry)[0].decode())
    assert total(page, "lpa:http_requests_total") == 2
    assert checks.counted(page["lpa:http_requests_total"])[*POST, "429"] == 1
    assert total(page, "lpa:no_such_metric") == 0
