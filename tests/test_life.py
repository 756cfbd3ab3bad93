"""The life of the serving process: its port, its signals, its end; and how requests share its places."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lpa_model.config import Architecture
from server import serve as serve_module
from server.listen import listeners, url_of
from server.serve import Server, greeting
from server.settings import load_settings
from tests.serving import Served, serving, slow_steps, until

COMPLETIONS = "/v1/completions"


@pytest.fixture
def folder(tiny_checkpoints: dict[Architecture, Path]) -> Path:
    return tiny_checkpoints["setting2"]


def in_background(call: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


def drain(served: Served) -> None:
    served.server.handle_exit(signal.SIGTERM, None)
    until(lambda: not served.server.engine.accepting)


def test_a_request_that_has_begun_submits_all_of_its_prompts_while_the_server_drains(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder, max_num_seqs=4, drain_timeout=600) as served:
        slow_steps(served, monkeypatch, 0.005)
        prompts = [[5, 6, i] for i in range(100)]
        body = {"prompt": prompts, "max_tokens": 2, "ignore_eos": True}
        thread, found = in_background(lambda: served.post(COMPLETIONS, **body))
        until(lambda: served.engine.has_work)
        drain(served)
        with httpx.Client(base_url=served.url) as other:
            for path in ("/ready", COMPLETIONS):
                refused = (
                    other.get(path) if path == "/ready" else other.post(path, json={"model": "tiny", "prompt": "x"})
                )
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        thread.join(600)
        assert found[0].status_code == 200, found[0].text
        assert len(found[0].json()["choices"]) == 100
        until(lambda: served.server.should_exit)
        assert served.server.status == 0


def test_a_body_of_lines_that_has_begun_is_scored_to_its_end_while_the_server_drains(folder: Path) -> None:
    with serving(folder, max_num_seqs=2, drain_timeout=600) as served:
        draining = threading.Event()

        def lines() -> Iterator[bytes]:
            yield b'{"input": "the sea"}\n'
            draining.wait(600)
            for _ in range(40):
                time.sleep(0.002)  # between lines nothing of the request is with the engine
                yield b'{"input": "a gull by the sea"}\n'

        headers = {"content-type": "application/x-ndjson"}
        url = "/v1/perplexity?model=tiny&stream=true"
        thread, found = in_background(lambda: served.client.post(url, content=lines(), headers=headers))
        until(lambda: bool(served.server.engine._begun))
        until(lambda: not served.server.engine._mailboxes)
        drain(served)
        time.sleep(0.1)
        assert not served.server.should_exit
        draining.set()
        thread.join(600)
        answers = [json.loads(line) for line in found[0].text.splitlines()]
        assert found[0].status_code == 200 and not any("error" in answer for answer in answers)
        assert answers[-1]["aggregate"]["num_texts"] == 41, answers[-1]
        until(lambda: served.server.should_exit)
        assert served.server.status == 0


def test_a_drain_that_cuts_requests_off_is_no_clean_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder, drain_timeout=0.1) as served:
        slow_steps(served, monkeypatch, 0.05)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 100, "ignore_eos": True}
        thread, found = in_background(lambda: served.post(COMPLETIONS, **body))
        until(lambda: served.engine.has_work)
        drain(served)
        thread.join(600)
        assert found[0].status_code == 503 and found[0].headers["retry-after"] == "5"
        until(lambda: served.server.should_exit)
        assert served.server.status == 1


def test_a_client_that_has_stopped_reading_does_not_hold_the_drain(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_module, "FLUSH_TIMEOUT", 0.2)
    with serving(folder, drain_timeout=600, max_num_seqs=16) as served, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", served.server.port))
        fields = {"max_tokens": 60, "ignore_eos": True, "logprobs": 20, "stream": True}
        body = json.dumps({"model": "tiny", "prompt": ["a"] * 4000, **fields}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        client.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
        until(lambda: any(connection.flow.write_paused for connection in served.server.server_state.connections))
        drain(served)
        until(lambda: served.server.should_exit)
        assert served.server.status == 0


def test_one_request_with_many_choices_does_not_hold_all_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder, max_num_seqs=4) as served:
        slow_steps(served, monkeypatch, 0.03)
        body = {"prompt": "a", "n": 64, "max_tokens": 100, "ignore_eos": True, "temperature": 1}
        body |= {"model": "tiny", "stream": True}
        with httpx.stream("POST", served.url + COMPLETIONS, json=body, timeout=600) as answer:
            lines = answer.iter_lines()
            next(lines)
            scheduler = served.engine.scheduler
            until(lambda: len(scheduler.running) == 4)
            first = {request.id for request in scheduler.running}
            for _ in range(3):
                assert served.complete(prompt="b", max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2
                assert len({request.group for request in scheduler.running}) == 1  # its places are its own again
            # none of the four that ran at first has ended: they take 100 steps
            assert first <= {request.id for request in [*scheduler.running, *scheduler.waiting.ready[False]]}
        until(served.idle)


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions"])
def test_a_stream_that_waits_in_the_queue_sends_comments_after_its_headers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    with serving(folder, max_num_seqs=1, max_queue=1, waiting_comment_interval=0.05) as served:
        slow_steps(served, monkeypatch, 0.02)
        running: dict[str, Any] = {"prompt": "a", "max_tokens": 60, "ignore_eos": True}
        thread, found = in_background(lambda: served.post(COMPLETIONS, **running))
        until(lambda: len(served.engine.scheduler.running) == 1)
        body: dict[str, Any] = {"model": "tiny", "max_tokens": 3, "ignore_eos": True, "stream": True}
        body |= {"prompt": "b"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "b"}]}
        with httpx.stream("POST", served.url + path, json=body, timeout=600) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            assert next(lines) == ": waiting"
            assert not found  # the other one is still running
            refused = served.post(path, **{**body, "stream": True})
            assert refused.status_code == 429  # before the headers a refusal has its own status
            rest = [line for line in lines if line]
        assert rest.count(": waiting") >= 1
        events = [line for line in rest if line != ": waiting"]
        assert rest[-len(events) :] == events and events[-1] == "data: [DONE]"  # no comment once it has begun
        thread.join(600)


def test_a_stream_that_is_left_while_it_waits_costs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder, max_num_seqs=1, waiting_comment_interval=0.05) as served:
        slow_steps(served, monkeypatch, 0.02)
        thread, _ = in_background(lambda: served.post(COMPLETIONS, prompt="a", max_tokens=60, ignore_eos=True))
        until(lambda: len(served.engine.scheduler.running) == 1)
        body = {"model": "tiny", "prompt": "b", "stream": True}
        with httpx.stream("POST", served.url + COMPLETIONS, json=body, timeout=600) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": waiting"
        until(lambda: not served.engine.scheduler.waiting)
        thread.join(600)
        until(served.idle)


def test_scoring_behind_a_full_queue_gets_its_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder, max_num_seqs=2, max_queue=0) as served:
        slow_steps(served, monkeypatch, 0.002)
        ended, statuses = threading.Event(), []

        def press() -> None:
            with httpx.Client(base_url=served.url, timeout=600) as client:
                while not ended.is_set():
                    body = {"model": "tiny", "prompt": "x", "max_tokens": 4, "ignore_eos": True}
                    statuses.append(client.post(COMPLETIONS, json=body).status_code)

        thread = None
        try:
            headers = {"content-type": "application/x-ndjson"}

            def lines() -> Iterator[bytes]:
                nonlocal thread
                yield b'{"input": "the sea"}\n'
                until(lambda: bool(served.server.engine._begun))
                thread = [in_background(press)[0] for _ in range(4)]
                until(lambda: 429 in statuses)
                for _ in range(20):
                    yield b'{"input": "a gull by the sea"}\n'

            answer = served.client.post("/v1/perplexity?model=tiny", content=lines(), headers=headers)
            assert answer.status_code == 200, answer.text
            assert statuses.count(200) > 0
        finally:
            ended.set()
            for one in thread or ():
                one.join(600)


def test_a_taken_port_is_found_before_the_model_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.serve.build_engine", lambda *_: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--port \(LPA_PORT\): {port} is taken on 127\.0\.0\.1"):
            Server(load_settings(model=folder, port=port))
    with pytest.raises(ValueError, match=r"--host \(LPA_HOST\): 'no\.such\.host\.invalid' is no address"):
        Server(load_settings(model=folder, host="no.such.host.invalid"))
    with pytest.raises(ValueError, match=r"--host \(LPA_HOST\): cannot listen on 192\.0\.2\.1"):
        Server(load_settings(model=folder, host="192.0.2.1"))


def test_the_port_is_free_again_when_the_model_cannot_be_loaded(tmp_path: Path) -> None:
    (first,) = listeners("127.0.0.1", 0)
    port = first.getsockname()[1]
    first.close()
    with pytest.raises(ValueError, match="no such model folder"):
        Server(load_settings(model=tmp_path / "none", port=port))
    (again,) = listeners("127.0.0.1", port)
    again.close()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("0:0:0:0:0:0:0:0", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("fe80::1%eth0", "http://[fe80::1%25eth0]:80"),
        ("localhost", "http://localhost:80"),
    ],
)
def test_the_url_that_is_printed_can_be_opened(host: str, url: str) -> None:
    assert url_of(host, 80) == url
    assert httpx.URL(url).port in (80, None)


@pytest.mark.parametrize("host", ["::1", "localhost", "0.0.0.0", "::"])
def test_a_server_answers_at_the_url_that_it_prints(folder: Path, host: str) -> None:
    try:
        for listener in listeners(host, 0):
            listener.close()
    except ValueError:
        assert ":" in host  # a machine without IPv6
        return
    with serving(folder, host=host) as served:
        found = re.search(r"open (http://\S+)/ in a browser", greeting(served.server._settings, served.server.port))
        assert found is not None
        assert httpx.get(f"{found[1]}/health").status_code == 200


def test_running_out_of_descriptors_is_logged_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(folder) as served:
        sample = 'lpa:out_of_descriptors_total{model_name="tiny"}'
        assert served.metric(sample) == 0
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            until(lambda: "no file descriptor is left" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        until(lambda: "there are file descriptors again" in caplog.text)
        assert served.metric(sample) >= 1
        assert caplog.text.count("no file descriptor is left") == 1
