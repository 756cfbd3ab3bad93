"""Requests that are cancelled by their id."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lpa_model.config import Architecture
from tests.serving import Served, serving, slow_steps, until

BOSS = {"authorization": "Bearer boss"}
LONG = {"model": "tiny", "prompt": ["a", "b"], "n": 2, "max_tokens": 100, "ignore_eos": True}


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"], admin_api_key="boss") as server:
        yield server


class Asked(threading.Thread):
    """A request on its way, and its answer."""

    def __init__(self, served: Served, path: str, request_id: str, body: dict[str, Any]) -> None:
        super().__init__()
        self._ask = lambda: httpx.post(served.url + path, json=body, headers={"x-request-id": request_id}, timeout=600)
        self.answer: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.answer = self._ask()

    def result(self) -> httpx.Response:
        self.join(600)
        assert self.answer is not None
        return self.answer


def running(served: Served, request_id: str) -> int:
    """Sequences of a request that are being computed."""
    return sum(request.id.startswith(f"{request_id}-") for request in list(served.engine.scheduler.running))


def cancel(served: Served, request_id: str) -> httpx.Response:
    return served.client.post(f"/v1/requests/{request_id}/cancel", headers=BOSS)


@pytest.mark.parametrize("prefix", ["", "cmpl-", "chatcmpl-"])
def test_a_cancelled_request_gets_a_499_and_its_sequences_end(
    served: Served, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    slow_steps(served, monkeypatch, 0.05)
    asked = Asked(served, "/v1/completions", "whole", LONG)
    until(lambda: running(served, "whole") == 4)
    answer = cancel(served, f"{prefix}whole")
    assert answer.json() == {"id": f"{prefix}whole", "object": "request.cancelled", "cancelled": 1}
    refused = asked.result()
    assert refused.status_code == 499
    assert refused.json()["error"]["code"] == "request_cancelled"
    assert refused.headers["x-request-id"] == "whole"
    until(served.idle)
    assert cancel(served, "whole").status_code == 404


def test_a_cancelled_stream_ends_with_an_error_event(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(served, monkeypatch, 0.05)
    body = {**LONG, "stream": True}
    with served.client.stream(
        "POST", "/v1/completions", json=body, headers={"x-request-id": "streamed"}, timeout=600
    ) as response:
        lines = response.iter_lines()
        assert "choices" in next(lines)
        assert httpx.post(f"{served.url}/v1/requests/streamed/cancel", headers=BOSS).status_code == 200
        *_, last = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_cancelled"
    until(served.idle)


def test_every_request_of_an_id_is_cancelled_but_no_other(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(served, monkeypatch, 0.05)
    twice = [Asked(served, "/v1/completions", "twice", LONG) for _ in range(2)]
    scoring = Asked(served, "/v1/perplexity", "scoring", {"model": "tiny", "input": [[5] * 100] * 200})
    other = Asked(served, "/v1/completions", "other", {**LONG, "max_tokens": 30})
    until(lambda: running(served, "twice") == 8 and all(running(served, name) for name in ("scoring", "other")))
    assert cancel(served, "twice").json()["cancelled"] == 2
    assert cancel(served, "scoring").json()["cancelled"] == 1
    assert [asked.result().status_code for asked in (*twice, scoring, other)] == [499, 499, 499, 200]
    until(served.idle)


def test_a_request_does_not_cancel_itself(served: Served) -> None:
    headers = {**BOSS, "x-request-id": "self"}
    answer = served.client.post("/v1/requests/self/cancel", headers=headers)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "request_not_found"


def test_an_id_may_look_like_an_answers(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(served, monkeypatch, 0.05)
    asked = Asked(served, "/v1/completions", "cmpl-mine", LONG)
    until(lambda: running(served, "cmpl-mine") == 4)
    assert cancel(served, "cmpl-cmpl-mine").status_code == 200
    assert asked.result().status_code == 499
    until(served.idle)


def test_a_response_is_cancelled_by_its_id(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(served, monkeypatch, 0.05)
    body = {"model": "tiny", "input": "x", "max_output_tokens": 90, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/responses", json=body, timeout=600) as stream:
        events = (json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data: "))
        response_id = next(events)["response"]["id"]
        assert cancel(served, response_id).json() == {
            "id": response_id,
            "object": "request.cancelled",
            "cancelled": 1,
        }
        *_, last = events
    assert (last["type"], last["response"]["status"]) == ("response.failed", "cancelled")
    assert served.client.get(f"/v1/responses/{response_id}").json()["status"] == "cancelled"
    assert cancel(served, response_id).status_code == 404
    until(served.idle)
