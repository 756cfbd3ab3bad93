"""One of several replicas, without Ray: what it asks of the others, what it refuses, and settings that do not fit."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from typer.testing import CliRunner

from lpa_model.config import Architecture
from server.app import create_app
from server.cli import app as cli
from server.engine.async_engine import AsyncEngine
from server.engine.engine import build_engine
from server.errors import Unavailable
from server.metrics import Metrics
from server.replicas import Merged, Replicas, check_replicated, labelled
from server.settings import SettingsError, load_settings

BOSS = {"authorization": "Bearer boss"}


class Others:
    """Two more replicas, or none that answers in time while they are `silent`."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.pages = [Metrics("tiny"), Metrics("tiny")]
        self.silent = False
        for number, metrics in enumerate(self.pages, 2):
            for _ in range(number):
                metrics.observe_http("/v1/completions", "POST", 200, 0.1)

    async def __call__(self, method: str, *arguments: Any) -> list[Any]:
        if self.silent:
            raise Unavailable("a replica has not answered")
        self.asked.append((method, *arguments))
        if method == "metrics":
            return [labelled(name, page.registry.collect()) for name, page in zip("bc", self.pages, strict=True)]
        return [2, 3]


@asynccontextmanager
async def replica(folder: Path, others: Others) -> AsyncIterator[httpx.AsyncClient]:
    given = {"threads": 1, "dtype": "float32", "block_size": 32, "kv_cache_memory": 1 << 22}
    settings = load_settings(
        **given, model=folder, served_model_name="tiny", admin_api_key="boss", ray_replicas=3, max_stored_responses=0
    )
    metrics = Metrics("tiny")
    engine = AsyncEngine(build_engine(folder, settings.engine_options()), metrics.observe, max_queue=8)
    app = create_app(engine, settings, metrics, Replicas("a", others))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://replica", headers=BOSS) as client,
    ):
        yield client


def requests_by_replica(page: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == "lpa:http_requests_total" and sample.labels["handler"] == "/v1/completions":
                found[sample.labels["replica"]] = sample.value
    return found


@pytest.fixture
def folder(tiny_checkpoints: dict[Architecture, Path]) -> Path:
    return tiny_checkpoints["setting2"]


async def test_the_metrics_of_all_replicas_are_one_page(folder: Path) -> None:
    others = Others()
    async with replica(folder, others) as client:
        assert (await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200
        page = await client.get("/metrics")
        assert requests_by_replica(page.text) == {"a": 1, "b": 2, "c": 3}
        names = [line.split()[2] for line in page.text.splitlines() if line.startswith("# TYPE ")]
        assert len(names) == len(set(names))  # the format has each family once
        for family in text_string_to_metric_families(page.text):
            assert all("replica" in sample.labels for sample in family.samples), family.name
        openmetrics = await client.get("/metrics", headers={"accept": "application/openmetrics-text"})
        assert openmetrics.text.endswith("# EOF\n")
        assert requests_by_replica(page.text) == requests_by_replica(openmetrics.text)
        others.silent = True
        answer = await client.get("/metrics")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


async def test_control_routes_ask_the_others(folder: Path) -> None:
    others = Others()
    async with replica(folder, others) as client:
        cancelled = await client.post("/v1/requests/some/cancel")
        assert cancelled.json() == {"id": "some", "object": "request.cancelled", "cancelled": 5}
        assert (await client.post("/reset_prefix_cache")).json()["freed_blocks"] == 5
        assert (await client.post("/log_level", json={"level": "info"})).status_code == 200
    assert others.asked == [("cancel", "some"), ("reset_prefix_cache",), ("set_log_level", "info")]


async def test_rays_proxy_sends_the_request_id(folder: Path) -> None:
    async with replica(folder, Others()) as client:
        answer = await client.get("/health", headers={"x-request-id": "mine"})
        assert "x-request-id" not in answer.headers
        body = {"prompt": "a", "max_tokens": 1}
        found = await client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
        assert found.json()["id"] == "cmpl-mine"


async def test_what_needs_one_place_is_refused(folder: Path) -> None:
    paths = ["/v1/files/x", "/v1/files/x/content", "/v1/batches/x/cancel", "/v1/responses/x", "/v1/responses/x/cancel"]
    calls = [(method, path) for method in ("GET", "POST", "DELETE") for path in paths]
    calls += [(method, path) for method in ("GET", "POST") for path in ("/v1/files", "/v1/batches")]
    async with replica(folder, Others()) as client:
        for method, path in calls:
            answer = await client.request(method, path)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "not_with_replicas"), (method, path)
            assert "--ray-replicas" in error["message"]
            assert error["type"] == "invalid_request_error"


async def test_a_response_that_needs_a_memory_is_refused(folder: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
    ]
    body = {"input": "Hello.", "max_output_tokens": 2}
    async with replica(folder, Others()) as client:
        for fields, param in cases:
            answer = await client.post("/v1/responses", json={**body, **fields})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, param, "not_with_replicas")
            assert error["message"].startswith(f"{param}: ")
        for stateless in ({}, {"store": False}):
            answer = await client.post("/v1/responses", json={**body, **stateless})
            assert (answer.status_code, answer.json()["store"]) == (200, False)


def test_merging_keeps_every_sample() -> None:
    pages = {name: Metrics("tiny") for name in "ab"}
    pages["a"].observe_caller("alice", 3, 4)  # samples that only one of them has
    merged = Merged(labelled(name, page.registry.collect()) for name, page in pages.items())

    def samples(collector: Collector) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
        found = [sample for family in collector.collect() for sample in family.samples]
        return sorted((sample.name, tuple(sorted(sample.labels.items()))) for sample in found)

    expected = [
        (name, tuple(sorted((*labels, ("replica", replica)))))
        for replica, page in pages.items()
        for name, labels in samples(page.registry)
    ]
    assert samples(merged) == sorted(expected)


@pytest.mark.parametrize(
    ("value", "replicas"), [("2", (2, 2)), (2, (2, 2)), ("1:4", (1, 4)), ("3:3", (3, 3)), (None, (1, 1))]
)
def test_replicas_are_a_number_or_two(value: Any, replicas: tuple[int, int]) -> None:
    assert load_settings(ray_replicas=value).replicas == replicas


@pytest.mark.parametrize("value", ["0", "-1", "4:2", "0:2", "1:", ":2", "1:2:3", "two", "1.5", "9999999", " 2"])
def test_other_numbers_of_replicas_are_refused(value: str) -> None:
    with pytest.raises(SettingsError, match=r"--ray-replicas \(LPA_RAY_REPLICAS\): must be .* not"):
        load_settings(ray_replicas=value)


@pytest.mark.parametrize(
    "given",
    [
        {"max_stored_responses": 8},
        {"max_stored_bytes": 8},
        {"header_timeout": 5},
        {"body_timeout": 5},
        {"max_connections": 5},
        {"uds": "lpa.sock"},
        {"ssl_certfile": "server.pem"},
        {"proxy_headers": False},
        {"forwarded_allow_ips": "*"},
        {"device": "cuda:1"},
    ],
)
def test_a_setting_that_replicas_cannot_honour_is_named(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} \(LPA_{name.upper()}\): .*--ray-replicas"):
        check_replicated(load_settings(ray_replicas="2", **given))
    check_replicated(load_settings(ray_replicas="2"))


def start(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["serve", *arguments])
    return done.exit_code, done.stderr


def test_files_and_batches_are_refused_at_the_start(tmp_path: Path) -> None:
    code, told = start("--ray-replicas", "2", "--data-dir", str(tmp_path))
    assert (code, told.count("\n")) == (2, 1)
    assert told.startswith("lpa: --data-dir (LPA_DATA_DIR): does not go with --ray-replicas: ")


def test_a_missing_ray_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server.ray_serve", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    told = "lpa: --ray-replicas (LPA_RAY_REPLICAS): ray is not installed; pip install 'lpa-server[ray]' brings it\n"
    assert start("--ray-replicas", "2") == (2, told)


def test_the_number_may_be_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "lpa.toml"
    file.write_text("ray_replicas = 2\n")
    assert load_settings(config=str(file)).replicas == (2, 2)
