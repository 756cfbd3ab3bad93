"""Two replicas on a Ray cluster of this machine: what clients see of them, of one that is killed, and of the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
import yaml

from server.settings import embedded_checkpoint
from tests.documents import ROOT, blocks
from tests.extra.test_prometheus import prometheus, query
from tests.processes import free_port

OPERATIONS = ROOT / "server/docs/operations.md"
PATIENCE = 300.0  # seconds for anything that a slow machine may do slowly
BOSS = {"authorization": "Bearer boss"}
FIXED: dict[str, Any] = {"model": "lpa-tiny", "prompt": "Once upon a time", "extra_body": {"ignore_eos": True}}
LONG: dict[str, Any] = {"model": "lpa-tiny", "prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True}
METRIC = re.compile(r"^lpa:(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
# the official client of version 3 hands its transport's errors on, once a stream has begun
RETRIABLE = (openai.APIConnectionError, openai.InternalServerError, httpx.TransportError, httpx2.TransportError)

# a replica whose engine fails at every step once `break_engine` is called
BROKEN = """
import sys, time
from ray import serve
from server import ray_serve
from server.settings import load_settings

class Breaking(ray_serve.Replica):
    async def break_engine(self):
        def fail(batch):
            raise RuntimeError("no")
        self._engine._engine.runner.run = fail

ray_serve.Replica = Breaking
settings = load_settings(ray_replicas="1", threads=1, kv_cache_memory=1 << 26, port=int(sys.argv[1]))
ray_serve._connect(settings)
handle = serve.run(ray_serve.application(settings), name=ray_serve.APP)
handle.broadcast("break_engine").results()
while True:
    time.sleep(1)
"""


class Cluster:
    """The process that has started it, and a client of the server."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def openai(self, retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=retries, timeout=PATIENCE)

    def metric(self, name: str, **labels: str) -> dict[str, float]:
        """The sum of a metric's samples with these labels, by replica."""
        page = self.client.get("/metrics")
        assert page.status_code == 200, page.text
        found: dict[str, float] = {}
        for sample, text, value in METRIC.findall(page.text):
            given = dict(re.findall(r'(\w+)="([^"]*)"', text))
            if sample == name and labels.items() <= given.items():
                found[given["replica"]] = found.get(given["replica"], 0) + float(value)
        return found

    def answered(self) -> dict[str, float]:
        """Completions by replica."""
        return self.metric("http_requests_total", handler="/v1/completions", status="200")

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, self.log.read_text()[-5000:]
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            time.sleep(0.2)

    def replicas(self) -> list[int]:
        """Their processes, below ours."""
        parents, found = {}, []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(folder.name)] = int(re.findall(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.M)[0])
                if b"ServeReplica:lpa:LPA" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # it has ended
                continue

        def ours(pid: int) -> bool:
            return pid == self.process.pid or (pid in parents and ours(parents[pid]))

        return [pid for pid in found if ours(pid)]


@contextmanager
def started(folder: Path, port: int, *command: str) -> Iterator[Cluster]:
    log = folder / "log"
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=output, text=True
        )
    cluster = Cluster(process, port, log)

    def ready() -> bool:
        try:
            return cluster.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        cluster.until(ready)
        yield cluster
    finally:
        cluster.client.close()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    port = free_port()
    settings = ["--threads", "1", "--kv-cache-memory", str(64 << 20), "--admin-api-key", "boss"]
    command = ["-m", "server.cli", "serve", "--ray-replicas", "2", "--port", str(port), *settings]
    with started(tmp_path_factory.mktemp("ray"), port, *command) as found:
        found.until(lambda: len(found.metric("build_info")) == 2)
        yield found


def in_parallel(number: int, call: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(call, range(number)))


def test_streams_of_the_official_client_are_whole_and_each_replica_counts_its_own(cluster: Cluster) -> None:
    client, before = cluster.openai(), cluster.answered()

    def stream(_: int) -> tuple[str, int]:
        texts = [
            chunk.choices[0].text
            for chunk in client.completions.create(**FIXED, max_tokens=40, temperature=0, stream=True)
        ]
        return "".join(texts), len(texts)

    found = in_parallel(24, stream)
    whole = client.completions.create(**FIXED, max_tokens=40, temperature=0).choices[0].text
    assert {text for text, _ in found} == {whole}
    assert max(pieces for _, pieces in found) > 5
    counts = {name: count - before.get(name, 0) for name, count in cluster.answered().items()}
    assert sum(counts.values()) == 25
    assert len(counts) == 2 and all(count > 0 for count in counts.values()), counts
    generated = cluster.metric("generation_tokens_total")
    assert all(count > 0 for count in generated.values()) and len(generated) == 2


def test_prometheus_tells_the_replicas_apart(cluster: Cluster, tmp_path: Path) -> None:
    in_parallel(16, lambda _: cluster.client.post("/v1/completions", json={**LONG, "max_tokens": 8}))
    counts = cluster.answered()
    expression = 'sum by (replica) (lpa:http_requests_total{handler="/v1/completions", status="200"})'
    with prometheus(cluster.url.removeprefix("http://"), tmp_path) as client:
        cluster.until(lambda: sorted(query(client, expression)) == sorted(counts.values()))
        assert query(client, 'up{job="lpa"}') == [1]
    assert len(counts) == 2


def test_a_seed_gives_the_same_text_from_either_replica(cluster: Cluster) -> None:
    client, before = cluster.openai(), cluster.answered()
    found = in_parallel(24, lambda _: client.completions.create(**FIXED, max_tokens=30, temperature=1.0, seed=7))
    after = cluster.answered()
    assert len(after) == 2 and all(after[name] > before.get(name, 0) for name in after), (before, after)
    assert len({answer.choices[0].text for answer in found}) == 1
    assert len({answer.system_fingerprint for answer in found}) == 1
    assert client.completions.create(**FIXED, max_tokens=30, temperature=1.0, seed=8).choices[0].text not in {
        answer.choices[0].text for answer in found
    }


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/files", None),
        ("GET", "/v1/files/file-1/content", None),
        ("DELETE", "/v1/files/file-1", None),
        ("POST", "/v1/batches", {}),
        ("POST", "/v1/batches/batch_1/cancel", None),
        ("GET", "/v1/responses/resp_1", None),
        ("DELETE", "/v1/responses/resp_1", None),
        ("GET", "/v1/responses/resp_1/input_items", None),
        ("POST", "/v1/responses", {"input": "and?", "previous_response_id": "resp_1"}),
        ("POST", "/v1/responses", {"input": "Hello.", "store": True}),
    ],
)
def test_what_needs_one_place_is_refused_by_name(cluster: Cluster, method: str, path: str, body: Any) -> None:
    answer = cluster.client.request(method, path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "not_with_replicas"), answer.text
    assert "--ray-replicas" in error["message"]


def test_a_response_says_that_it_is_not_kept(cluster: Cluster) -> None:
    answer = cluster.openai().responses.create(model="lpa-tiny", input="Once upon a time", max_output_tokens=4)
    assert answer.output_text
    assert answer.store is False  # type: ignore[attr-defined]  # a field that the client's type lacks


def test_control_routes_reach_every_replica(cluster: Cluster) -> None:
    for number in range(6):  # any replica may answer
        name = f"to-be-cancelled-{number}"
        body = {**LONG, "stream": True, "n": 4}
        with cluster.client.stream("POST", "/v1/completions", json=body, headers={"x-request-id": name}) as answer:
            assert answer.headers["x-request-id"] == name
            lines = answer.iter_lines()
            next(lines)  # the stream is not held back: it still runs
            done = cluster.client.post(f"/v1/requests/{name}/cancel", headers=BOSS)
            assert (done.status_code, done.json().get("cancelled")) == (200, 1), done.text
            events = [line for line in lines if line.startswith("data: ")]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "request_cancelled"
    missing = cluster.client.post("/v1/requests/nothing/cancel", headers=BOSS)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")

    prompt = {"model": "lpa-tiny", "prompt": "a long prompt of many words " * 20, "max_tokens": 1}
    in_parallel(16, lambda _: cluster.client.post("/v1/completions", json=prompt))
    assert cluster.client.post("/reset_prefix_cache", headers=BOSS).json()["freed_blocks"] > 0
    assert cluster.client.post("/reset_prefix_cache", headers=BOSS).json()["freed_blocks"] == 0


def test_a_client_that_leaves_ends_its_work(cluster: Cluster) -> None:
    for _ in range(4):
        with cluster.client.stream("POST", "/v1/completions", json={**LONG, "stream": True, "n": 8}) as answer:
            next(answer.iter_lines())
    cluster.until(lambda: sum(cluster.metric("num_requests_running").values()) == 0)
    aborted = cluster.metric("request_success_total", finished_reason="abort")
    assert sum(aborted.values()) >= 8, aborted


def test_a_killed_replica_is_replaced_and_clients_may_retry(cluster: Cluster) -> None:
    before = set(cluster.metric("build_info"))
    expected = cluster.openai().completions.create(**FIXED, max_tokens=60, temperature=0).choices[0].text
    ended = threading.Event()
    patient: list[str] = []
    seen: list[str | Exception] = []

    def with_retries(_: int) -> None:
        client = cluster.openai(retries=6)
        while not ended.is_set():
            patient.append(client.completions.create(**FIXED, max_tokens=60, temperature=0).choices[0].text)

    def without(_: int) -> None:
        client = cluster.openai()
        while not ended.is_set():
            try:
                stream = client.completions.create(**FIXED, max_tokens=60, temperature=0, stream=True)
                seen.append("".join(chunk.choices[0].text for chunk in stream))
            except RETRIABLE as error:
                seen.append(error)
                time.sleep(0.1)

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(call, n) for call in (with_retries, without) for n in range(4)]
        try:
            cluster.until(lambda: len(patient) > 8 and len(seen) > 8)
            (victim, *others) = cluster.replicas()
            assert len(others) == 1
            os.kill(victim, signal.SIGKILL)
            # a new one, under load
            cluster.until(lambda: len(now := set(cluster.metric("build_info"))) == 2 and now != before)
            number = len(seen)
            cluster.until(lambda: len(seen) > number + 8)
        finally:
            ended.set()
        for one in running:
            one.result(PATIENCE)
    errors = [found for found in seen if isinstance(found, Exception)]
    assert len(errors) <= 4 * 2, errors  # those that were with the killed one
    assert {found for found in seen if isinstance(found, str)} == {expected}  # no text is cut off without an error
    assert set(patient) == {expected}
    assert len(before & set(cluster.metric("build_info"))) == 1


def test_a_signal_drains_all_replicas(cluster: Cluster) -> None:
    def stream(_: int) -> str:
        begun.release()
        with cluster.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            first.release()
            return list(lines)[-2]

    begun, first = threading.Semaphore(0), threading.Semaphore(0)
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, n) for n in range(8)]
        for _ in range(8):
            assert first.acquire(timeout=PATIENCE)
        cluster.process.send_signal(signal.SIGTERM)
        refused = None
        while refused is None and not all(one.done() for one in streams):
            answer = cluster.client.post("/v1/completions", json={**LONG, "max_tokens": 1})
            refused = answer if answer.status_code != 200 else None
        assert {one.result(PATIENCE) for one in streams} == {"data: [DONE]"}
    assert cluster.process.wait(PATIENCE) == 0, cluster.log.read_text()[-5000:]
    assert refused is not None, "the streams were too short"
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert int(refused.headers["retry-after"]) > 0
    assert not cluster.replicas()


def test_a_replica_whose_engine_dies_is_replaced(tmp_path: Path) -> None:
    port = free_port()
    with started(tmp_path, port, "-c", BROKEN, str(port)) as found:
        (broken,) = found.metric("build_info")
        answers: list[int] = []

        def complete() -> int:
            answers.append(found.client.post("/v1/completions", json={**LONG, "max_tokens": 1}).status_code)
            return answers[-1]

        found.until(lambda: complete() == 500)  # the engine fails
        found.until(lambda: complete() == 503)  # it takes no requests
        found.until(lambda: complete() == 200)
        assert broken not in found.metric("build_info")
        assert set(answers) <= {200, 500, 503}


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--ray-replicas", "2"]
    for arguments, words in (
        (["--model", str(tmp_path / "none")], "no such model folder"),
        (["--data-dir", str(tmp_path)], "--data-dir"),
    ):
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 2
        assert re.fullmatch(rf"lpa: .*{words}.*", done.stderr.splitlines()[-1])


def test_serve_run_with_the_documents_file_and_ray_adds_a_replica_under_load(tmp_path: Path) -> None:
    (shown,) = [block.text for block in blocks(OPERATIONS) if block.text.startswith("http_options:")]
    config = yaml.safe_load(shown)
    port = config["http_options"]["port"] = free_port()
    config["http_options"]["host"] = "127.0.0.1"
    config["applications"][0]["args"] |= {
        "model": str(embedded_checkpoint()),
        "ray_replicas": "1:2",
        "threads": 1,
        "kv_cache_memory": 64 << 20,
        "max_num_seqs": 1,
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    with started(tmp_path, port, "-m", "ray.serve.scripts", "run", str(file)) as found:
        assert len(found.metric("build_info")) == 1
        ended = threading.Event()

        def load(_: int) -> None:
            while not ended.is_set():
                assert found.client.post("/v1/completions", json=LONG).status_code == 200

        with ThreadPoolExecutor(6) as pool:
            running = [pool.submit(load, n) for n in range(6)]
            try:
                found.until(lambda: len(found.metric("build_info")) == 2)
            finally:
                ended.set()
            for one in running:
                one.result(PATIENCE)
