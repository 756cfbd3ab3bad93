"""Routes for operators, beside cancelling."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from lpa_model.config import Architecture
from tests.serving import Served, serving, slow_steps, until

BOSS = {"authorization": "Bearer boss"}


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"], admin_api_key="boss") as found:
        yield found


def reset(served: Served) -> int:
    answer = served.client.post("/reset_prefix_cache", headers=BOSS)
    assert answer.status_code == 200, answer.text
    freed: int = answer.json()["freed_blocks"]
    return freed


def test_an_emptied_prefix_cache_has_no_hits(served: Served) -> None:
    body = {"prompt": "a long prompt " * 10, "max_tokens": 2, "temperature": 0, "ignore_eos": True}

    def complete() -> tuple[int, int, str]:
        answer = served.complete(**body)
        usage = answer["usage"]
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], answer["choices"][0]["text"]

    tokens, nothing, text = complete()
    assert nothing == 0
    assert complete()[1] > 0
    assert reset(served) == tokens // 32 > 0
    assert reset(served) == 0
    assert complete() == (tokens, 0, text)
    assert served.idle()


def test_what_runs_while_the_cache_is_emptied_goes_on(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "another one " * 8, "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    expected = served.complete(**body)["choices"][0]["text"]
    slow_steps(served, monkeypatch, 0.02)
    with served.client.stream("POST", "/v1/completions", json={"model": "tiny", "stream": True, **body}) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        reset(served)
        rest = list(lines)
    assert "data: [DONE]" in rest
    assert first.startswith("data: {")
    monkeypatch.undo()
    until(served.idle)
    assert served.complete(**body)["choices"][0]["text"] == expected


def test_the_log_level_can_be_changed(served: Served) -> None:
    root = logging.getLogger()
    before = root.level
    try:
        answer = served.client.post("/log_level", json={"level": "error"}, headers=BOSS)
        assert answer.json() == {
            "object": "log_level",
            "level": "error",
            "before": logging.getLevelName(before).lower(),
        }
        assert root.level == logging.ERROR
        wrong = served.client.post("/log_level", json={"level": "loud"}, headers=BOSS)
        assert wrong.status_code == 400
        assert wrong.json()["error"]["param"] == "level"
        assert root.level == logging.ERROR
    finally:
        root.setLevel(before)


def test_only_an_admin_may(served: Served, tiny_checkpoints: dict[Architecture, Path]) -> None:
    for path, body in (("/reset_prefix_cache", {}), ("/log_level", {"level": "debug"})):
        assert served.client.post(path, json=body).status_code == 401
        assert served.client.post(path, json=body, headers={"authorization": "Bearer x"}).status_code == 401
