from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lpa_model.config import Architecture
from server.logs import JsonFormatter, Repeats
from tests.serving import Served, serving, slow_steps, until


class Kept(logging.Handler):
    """Keeps the lines that pass, as JSON reads them."""

    def __init__(self, most: int, window: float) -> None:
        super().__init__()
        self.addFilter(Repeats(most, window))
        self.setFormatter(JsonFormatter())
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler = Kept(2, 10)
    root = logging.getLogger()
    root.addHandler(handler)
    yield handler
    root.removeHandler(handler)


class Clock:
    """Time that a test moves on, with what is to be done then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self._due: list[tuple[float, Callable[[], None]]] = []
        monkeypatch.setattr("server.logs.monotonic", lambda: self.now)
        monkeypatch.setattr("server.logs.Timer", self._timer)

    def _timer(self, seconds: float, function: Callable[..., None], args: tuple[Any, ...]) -> Any:
        at = self.now + seconds
        return SimpleNamespace(daemon=False, start=lambda: self._due.append((at, lambda: function(*args))))

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        for entry in [entry for entry in self._due if entry[0] <= self.now]:
            self._due.remove(entry)
            entry[1]()


def test_warnings_that_repeat_are_held_back_and_counted(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, logger = Clock(monkeypatch), logging.getLogger("a.b")
    logging.getLogger("a").setLevel(logging.INFO)
    for number in range(10):
        logger.warning("client %d has left", number)
        logger.info("request %d", number)
        logging.getLogger("a.c").warning("client %d has left", number)
        clock.pass_by(0.9)
    messages = [line["message"] for line in kept.lines if line["logger"] == "a.b" and line["level"] == "warning"]
    assert messages == ["client 0 has left", "client 1 has left"]
    assert sum(line["level"] == "info" for line in kept.lines) == 10
    assert not [line for line in kept.lines if "repeated" in line]
    clock.pass_by(2)
    (told,) = (line for line in kept.lines if line.get("of_logger") == "a.b")
    assert (told["repeated"], told["level"]) == (8, "warning")
    assert told["message"] == "8 more lines like 'client %d has left' of a.b were left out in 10 seconds"
    logger.warning("client %d has left", 99)  # a new window
    assert kept.lines[-1]["message"] == "client 99 has left"


def test_few_repeats_pass_and_leave_nothing_behind(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, logger = Clock(monkeypatch), logging.getLogger("a.b")
    for number in range(200):  # texts that are never the same
        logger.error(f"text {number}")
    clock.pass_by(11)
    logger.error("the last")
    assert [line["message"] for line in kept.lines if line["logger"] == "a.b"][-2:] == ["text 199", "the last"]
    (repeats,) = kept.filters
    assert isinstance(repeats, Repeats)
    assert [text for name, _, text in repeats._windows if name == "a.b"] == ["the last"]


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as found:
        yield found


def line_of(kept: Kept, request_id: str) -> dict[str, Any]:
    def found() -> list[dict[str, Any]]:
        return [line for line in list(kept.lines) if line.get("request_id") == request_id]

    until(lambda: bool(found()))
    return found()[0]


@pytest.fixture
def log_requests(kept: Kept) -> Iterator[Kept]:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    yield kept
    root.setLevel(level)


def test_a_requests_line_has_tokens_timings_and_how_it_ended(
    served: Served, log_requests: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(served, monkeypatch, 0.01)
    served.client.headers["x-request-id"] = "with-two"
    served.complete(prompt="abcd", max_tokens=5, n=2, ignore_eos=True)
    line = line_of(log_requests, "with-two")
    expected = {"method": "POST", "path": "/v1/completions", "status": 200, "finish_reason": "length", "sequences": 2}
    assert line.items() >= {**expected, "prompt_tokens": 4, "cached_tokens": 0, "completion_tokens": 10}.items()
    assert line["prefill_ms"] >= 10
    assert line["decode_ms"] >= 4 * 10
    assert line["queue_ms"] + line["prefill_ms"] + line["decode_ms"] <= line["duration_ms"]
    served.client.headers["x-request-id"] = "models"
    served.client.get("/v1/models")
    assert "finish_reason" not in line_of(log_requests, "models")


def test_the_line_of_a_client_that_left_says_so(
    served: Served, log_requests: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(served, monkeypatch, 0.05)
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 100, "ignore_eos": True, "stream": True}
    headers = {"x-request-id": "left"}
    with served.client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        next(answer.iter_lines())
    line = line_of(log_requests, "left")
    assert (line["status"], line["finish_reason"]) == (499, "abort")
