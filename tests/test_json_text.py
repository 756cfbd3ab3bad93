"""Alternatives that are written as they are sent: the same answers as from dicts and lists."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpa_model.config import Architecture
from server.protocol import json_text
from server.protocol import logprobs as of_logprobs
from server.protocol import perplexity as of_perplexity
from server.protocol.json_text import JsonText, listed
from server.routes import perplexity as perplexity_route
from server.routes import respond
from server.routes.respond import in_pieces, json_parts, to_json
from tests.serving import Served, serving

VOLATILE = {"id", "created"}
CHAT = [{"role": "user", "content": "How is the sea?"}]
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/perplexity", {"input": ["the sea was", "a"], "method": "rolling", "return_tokens": True, "top_logprobs": -1}),
    ("/v1/perplexity", {"input": "the sea", "return_tokens": True, "top_logprobs": 9, "stream": True}),
    ("/v1/completions", {"prompt": ["the sea", "a"], "max_tokens": 0, "prompt_logprobs": -1}),
    ("/v1/completions", {"prompt": "the", "max_tokens": 3, "logprobs": -1, "echo": True, "n": 2, "seed": 1}),
    ("/v1/completions", {"prompt": "the", "max_tokens": 1, "logprobs": -1, "stream": True, "echo": True, "seed": 1}),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 3, "logprobs": True, "top_logprobs": -1, "seed": 1}),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 1, "prompt_logprobs": -1, "seed": 1}),
    (
        "/v1/chat/completions",
        {"messages": CHAT, "max_tokens": 1, "logprobs": True, "top_logprobs": -1, "stream": True, "seed": 1},
    ),
]


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


def answer(served: Served, path: str, body: dict[str, Any]) -> list[Any]:
    """The answer's objects, whole or in lines or events, in the order of their fields."""
    response = served.post(path, **body)
    assert response.status_code == 200, response.text
    texts = [line.removeprefix("data: ") for line in response.text.splitlines() if line and "[DONE]" not in line]
    assert all(text.startswith("{") for text in texts)
    return [json.loads(text, object_pairs_hook=fields) for text in texts]


def fields(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in pairs if name not in VOLATILE]


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_wide_answers_are_those_of_narrow_ones(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    narrow = answer(served, path, body)
    made = 0

    def counted(*args: Any) -> Iterator[str]:
        nonlocal made
        made += 1
        return listed(*args)

    for module in (of_logprobs, of_perplexity, perplexity_route):
        monkeypatch.setattr(module, "WIDE", 5)
    for module in (of_logprobs, of_perplexity):
        monkeypatch.setattr(module, "listed", counted)
    monkeypatch.setattr(respond, "SMALL", 5)
    monkeypatch.setattr(json_text, "RUN", 7)
    assert answer(served, path, body) == narrow and made


@given(st.lists(st.integers()), st.integers(1, 4))
def test_a_list_is_written_some_entries_at_a_time(numbers: list[int], run: int) -> None:
    text = JsonText(lambda: listed("[", map(str, numbers), "]"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "RUN", run)
        assert len(list(text.parts())) <= -(-len(numbers) // run) + 1
        for _ in range(2):  # each time anew
            pieces = in_pieces(json_parts({"a": [None, text], "b": text}, 2))
            assert b"".join(pieces).decode() == to_json({"a": [None, numbers], "b": numbers})
