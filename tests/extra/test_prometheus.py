"""A real Prometheus (Debian's package) beside a server under load: every panel's query has data, and the rules fire."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.settings import embedded_checkpoint
from tests.processes import free_port
from tests.serving import Served, serving

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "docker/prometheus/prometheus.yml"
RULES = ROOT / "docker/prometheus/rules.yml"
SCRAPES = 8  # seconds of load, a scrape in each
MINUTES = 20  # of the series that rules are tested on


def promtool(*arguments: Any) -> str:
    found = shutil.which("promtool")
    assert found is not None, "make test-extra installs Debian's package prometheus"
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_configuration_and_rules_are_valid() -> None:
    assert "SUCCESS" in promtool("check", "config", CONFIG)


# by alert: series over MINUTES, in promtool's notation, that make it fire, and such that do not
BAD = {
    "LpaDown": {'up{job="lpa"}': "0x{n}"},
    "LpaQueueGrowing": {"lpa:num_requests_waiting": "1+2x{n}"},
    "LpaSlowFirstToken": {
        'lpa:time_to_first_token_seconds_bucket{le="5.0"}': "0x{n}",
        'lpa:time_to_first_token_seconds_bucket{le="10.0"}': "0+10x{n}",
        'lpa:time_to_first_token_seconds_bucket{le="+Inf"}': "0+10x{n}",
    },
    "LpaCacheFull": {"lpa:kv_cache_usage_perc": "0.97x{n}"},
    "LpaErrors": {
        'lpa:http_requests_total{status="200"}': "0+50x{n}",
        'lpa:http_requests_total{status="500"}': "0+1x{n}",
    },
    "LpaEventLoopLag": {
        'lpa:event_loop_lag_seconds_bucket{le="0.25"}': "0+500x{n}",
        'lpa:event_loop_lag_seconds_bucket{le="0.5"}': "0+600x{n}",
        'lpa:event_loop_lag_seconds_bucket{le="+Inf"}': "0+600x{n}",
    },
}
GOOD = {
    "LpaDown": {'up{job="lpa"}': "1x{n}"},
    "LpaQueueGrowing": {"lpa:num_requests_waiting": "50-1x{n}"},  # long, but it shrinks
    "LpaSlowFirstToken": {
        'lpa:time_to_first_token_seconds_bucket{le="5.0"}': "0+1000x{n}",
        'lpa:time_to_first_token_seconds_bucket{le="10.0"}': "0+1001x{n}",
        'lpa:time_to_first_token_seconds_bucket{le="+Inf"}': "0+1001x{n}",
    },
    "LpaCacheFull": {"lpa:kv_cache_usage_perc": "0.97 0.97 0.5 0.97 0.97 0.5 0.97 0.97 0.5 0.97 0.97 0.5"},
    "LpaErrors": {
        'lpa:http_requests_total{status="200"}': "0+500x{n}",
        'lpa:http_requests_total{status="429"}': "0+500x{n}",
        'lpa:http_requests_total{status="500"}': "0+1x{n}",
    },
    "LpaEventLoopLag": {
        'lpa:event_loop_lag_seconds_bucket{le="0.25"}': "0+600x{n}",
        'lpa:event_loop_lag_seconds_bucket{le="0.5"}': "0+600x{n}",
        'lpa:event_loop_lag_seconds_bucket{le="+Inf"}': "0+600x{n}",
    },
}


def with_labels(series: str) -> str:
    name, _, rest = series.partition("{")
    return f'{name}{{instance="a:8000", {rest or "}"}'


@pytest.mark.parametrize("alert", BAD)
def test_an_alert_fires_on_what_it_is_for_and_on_nothing_less(alert: str, tmp_path: Path) -> None:
    (rule,) = (rule for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"] if rule["alert"] == alert)
    # what the annotations come to is not of interest
    bare = {key: value for key, value in rule.items() if key != "annotations"}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "lpa", "rules": [bare]}]}))

    def test_of(series: dict[str, str], alerts: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "interval": "1m",
            "input_series": [
                {"series": with_labels(name), "values": values.format(n=MINUTES)} for name, values in series.items()
            ],
            "alert_rule_test": [{"eval_time": f"{MINUTES - 8}m", "alertname": alert, "exp_alerts": alerts}],
        }

    labels = {"severity": rule["labels"]["severity"], "instance": "a:8000"} | (
        {"job": "lpa"} if alert == "LpaDown" else {}
    )
    tests = [test_of(BAD[alert], [{"exp_labels": labels}]), test_of(GOOD[alert], [])]
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": tests}))
    promtool("test", "rules", tmp_path / "tests.yml")


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[httpx.Client]:
    """Prometheus with our configuration, scraping a target every second; a client for it."""
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "rules.yml").write_text(RULES.read_text())
    found = shutil.which("prometheus")
    assert found is not None, "make test-extra installs Debian's package prometheus"
    port = free_port()
    command = [found, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    process = subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            deadline = time.monotonic() + 60
            while not _is_ready(client):
                assert time.monotonic() < deadline and process.poll() is None, "Prometheus did not start"
                time.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def load(served: Served) -> Iterator[None]:
    """Completions that share a prompt's beginning, texts to be scored and a batch, until the end."""
    story = "Once upon a time there was a little girl who had a red ball and a small dog. " * 4
    stop = threading.Event()

    def run(body: dict[str, Any], path: str) -> None:
        with httpx.Client(base_url=served.url, timeout=120) as client:
            while not stop.is_set():
                client.post(path, json={"model": "tiny", **body}).raise_for_status()

    bodies: list[tuple[dict[str, Any], str]] = [
        ({"prompt": story + str(i), "max_tokens": 20, "ignore_eos": True}, "/v1/completions") for i in range(3)
    ]
    bodies.append(({"input": story}, "/v1/perplexity"))
    lines = [
        json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": f"{i} men"}})
        for i in range(1000)
    ]
    form = {"files": {"file": ("in.jsonl", "\n".join(lines))}, "data": {"purpose": "batch"}}
    file = served.client.post("/v1/files", **form).raise_for_status().json()
    batch = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    served.client.post("/v1/batches", json=batch).raise_for_status()
    threads = [threading.Thread(target=run, args=arguments) for arguments in bodies]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)


def test_every_panel_has_data_under_load(tmp_path: Path) -> None:
    boards = [json.loads(path.read_text()) for path in sorted((ROOT / "docker/grafana/dashboards").glob("*.json"))]
    panels = [(board["title"], panel) for board in boards for panel in board["panels"]]
    queries = [(title, panel["title"], target["expr"]) for title, panel in panels for target in panel["targets"]]
    with (
        serving(embedded_checkpoint(), kv_cache_memory=1 << 26, data_dir=tmp_path / "data") as served,
        prometheus(served.url.removeprefix("http://"), tmp_path) as client,
        load(served),
    ):
        count = 'lpa:http_requests_total{handler="/metrics"}'
        deadline = time.monotonic() + 120
        while not any(value >= SCRAPES for value in query(client, count)):
            assert time.monotonic() < deadline, "Prometheus does not scrape"
            time.sleep(0.5)
        empty = []
        for title, panel, expression in queries:
            expression = expression.replace("$__rate_interval", "30s").replace("$instance", ".*")
            assert "$" not in expression
            if not any(map(math.isfinite, query(client, expression))):
                empty.append(f"{title}, {panel}: {expression}")
        assert not empty, "\n".join(empty)
        groups = client.get("/api/v1/rules").json()["data"]["groups"]
        health = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
        assert set(health.values()) == {"ok"} and len(health) == 6
        (scraped,) = query(client, "lpa:generation_tokens_total")
        assert 0 < scraped <= served.metric('lpa:generation_tokens_total{model_name="tiny"}')


def query(client: httpx.Client, expression: str) -> list[float]:
    """The values of the series that a query finds."""
    answer = client.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    return [float(series["value"][1]) for series in answer["data"]["result"]]
