"""What grows with a request has a limit, which a setting moves, and does not run on the event loop."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpa_model.config import Architecture
from lpa_model.perplexity import count_words
from server.errors import InvalidRequest
from server.protocol.json_size import CONTAINER, NAME, check_num_values
from server.routes import body as body_module
from server.routes import generation
from server.routes.body import SMALL, parse_json
from server.routes.respond import PIECE, RUN, in_pieces, json_parts, to_json
from tests.serving import Served, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LIMITS: dict[str, Any] = {
    "max_sequences": 6,
    "max_messages": 4,
    "max_list_entries": 3,
    "max_stop_bytes": 10,
    "max_bad_words_bytes": 12,
    "max_body_values": 30_000,
}


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"], **LIMITS) as server:
        yield server


def message(content: Any = "a") -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("path", "just", "beyond", "setting"),
    [
        (COMPLETIONS, {"prompt": ["a"] * 6}, {"prompt": ["a"] * 7}, "max_sequences"),
        (COMPLETIONS, {"prompt": ["a"] * 3, "n": 2}, {"prompt": ["a"] * 2, "n": 4}, "max_sequences"),
        (COMPLETIONS, {"prompt": ["a"], "best_of": 6}, {"prompt": ["a", "b"], "best_of": 4}, "max_sequences"),
        (CHAT, {"messages": [message()], "n": 6}, {"messages": [message()], "n": 7}, "max_sequences"),
        (CHAT, {"messages": [message()] * 4}, {"messages": [message()] * 5}, "max_messages"),
        ("/tokenize", {"messages": [message()] * 4}, {"messages": [message()] * 5}, "max_messages"),
        (COMPLETIONS, {"bad_words": ["a"] * 3}, {"bad_words": ["a"] * 4}, "max_list_entries"),
        (COMPLETIONS, {"bad_words": ["é" * 6]}, {"bad_words": ["é" * 6, "a"]}, "max_bad_words_bytes"),
        (COMPLETIONS, {"stop": ["é" * 5]}, {"stop": ["é" * 5, "a"]}, "max_stop_bytes"),
        (COMPLETIONS, {"stop_token_ids": [1] * 3}, {"stop_token_ids": [1] * 4}, "max_list_entries"),
        (
            COMPLETIONS,
            {"logit_bias": {str(i): 1 for i in range(3)}},
            {"logit_bias": {str(i): 1 for i in range(4)}},
            "max_list_entries",
        ),
    ],
)
def test_counts_have_limits_that_settings_move(
    served: Served, path: str, just: dict[str, Any], beyond: dict[str, Any], setting: str
) -> None:
    more = {} if path == "/tokenize" else {"max_tokens": 1}
    more |= {"prompt": "a"} if path == COMPLETIONS and "prompt" not in just else {}
    assert served.post(path, **more, **just).status_code == 200
    refused = served.post(path, **more, **beyond)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] in ("prompt", *beyond) and error["message"].startswith(error["param"])
    assert setting in error["message"] and str(LIMITS[setting]) in error["message"]


def test_a_body_has_a_limit_of_values(served: Served) -> None:
    for wrong in ([1] * 30_000, [[1]] * 6_000, ["a"] * 30_000):
        refused = served.post(COMPLETIONS, prompt=wrong)
        assert refused.status_code == 400 and "max_body_values" in refused.json()["error"]["message"]
    lines = served.client.post(
        "/v1/perplexity?model=tiny",
        content=b"[" + b"1," * 30_000 + b"1]\n",
        headers={"content-type": "application/x-ndjson"},
    )
    assert "line 1" in lines.json()["error"]["message"]
    text = "[{,:}]" * 20_000  # no values
    assert served.post("/tokenize", prompt=text).json()["tokens"]


def values_of(value: Any) -> int:
    """What `check_num_values` counts, by its definition: separators, and objects and lists."""
    if isinstance(value, dict):
        return CONTAINER + NAME * len(value) + max(0, len(value) - 1) + sum(map(values_of, value.values()))
    if isinstance(value, list):
        return CONTAINER + max(0, len(value) - 1) + sum(map(values_of, value))
    return 0


TEXTS = st.text(st.sampled_from('a"\\,:[]{}é\n'), max_size=8)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=20
)


@given(VALUES, st.booleans())
def test_values_are_counted_as_json_reads_them(value: Any, ascii_only: bool) -> None:
    text, count = json.dumps(value, ensure_ascii=ascii_only).encode(), values_of(value)
    check_num_values(text, count, "it")
    if count:
        with pytest.raises(InvalidRequest, match="max_body_values"):
            check_num_values(text, count - 1, "it")


def test_a_name_that_is_given_twice_among_many_is_found_at_once() -> None:
    names = [f'"{i}": 1' for i in range(200_000)]  # compared with one another they would take an hour
    with pytest.raises(InvalidRequest, match=r"^17: is given twice"):
        parse_json(f"{{{', '.join([*names, names[17]])}}}".encode())


@given(st.text(st.sampled_from("ab \n\t\u00a0\u2028"), max_size=30), st.integers(0, 3))
def test_words_are_counted_in_parts_as_at_once(text: str, times: int) -> None:
    long = text + (" x" * 40_000 + text) * times
    assert count_words(long) == len(re.split(r"\s+", long))


def test_an_answer_in_parts_is_the_encoders_own() -> None:
    rng = random.Random(1)
    value = {
        "a": list(range(2 * RUN + 1)),
        "b": [],
        "c": [{"x": [1, None, "é"]}, {"y": {}}],
        "d": {"e": [rng.random()]},
        "f": None,
        "g": [None, [1], [], {"h": [{"i": [[2]]}]}],
        "j": [["x" * PIECE]] * 2,
    }
    for levels in range(7):
        assert b"".join(in_pieces(json_parts(value, levels))) == to_json(value).encode()
    assert len(in_pieces(json_parts(value, 2))) > 2


class Threads:
    """The threads in which functions run."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, set[threading.Thread]] = {}
        self._patch = patch

    def watch(self, where: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(where, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.found.setdefault(name, set()).add(threading.current_thread())
            return original(*args, **kwargs)

        self._patch.setattr(where, name, watched)


def test_large_requests_are_read_and_answered_beside_the_event_loop(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"]) as served:
        threads = Threads(monkeypatch)
        loop = served.loop_thread()
        threads.watch(body_module, "parse_json")
        threads.watch(served.engine.tokenizer, "encode")
        threads.watch(served.engine.tokenizer, "decode")
        threads.watch(served.engine.tokenizer, "render_chat")
        padding = "x" * SMALL
        for path, body, work in (
            ("/tokenize", {"prompt": "the sea " * 5000}, {"parse_json", "encode"}),
            ("/detokenize", {"tokens": [5] * 20_000}, {"parse_json", "decode"}),
            (
                COMPLETIONS,
                {"prompt": ["a"] * 100, "bad_words": ["a b"] * 1000, "max_tokens": 1, "user": padding},
                {"parse_json", "encode"},
            ),
            (CHAT, {"messages": [message()] * 5, "max_tokens": 1, "user": padding}, {"parse_json", "render_chat"}),
            ("/v1/perplexity", {"input": ["the sea"] * 1600}, {"parse_json", "encode"}),
            ("/v1/loglikelihood", {"pairs": [["the", " sea"]] * 1100}, {"parse_json", "encode"}),
        ):
            threads.found.clear()
            answer = served.post(path, **body)
            assert answer.status_code == 200, (path, answer.text[:300])
            for name in work:
                assert threads.found[name] and loop not in threads.found[name], (path, name)


def test_a_request_with_many_prompts_is_submitted_as_it_can_run(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    request = generation.Request
    monkeypatch.setattr(generation, "Request", lambda *args, **more: made.append(args) or request(*args, **more))
    with serving(tiny_checkpoints["setting2"], max_num_seqs=2, max_queue=100) as served:
        seen: list[int] = []
        body = {"model": "tiny", "prompt": ["a b"] * 40, "max_tokens": 3, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", served.url + COMPLETIONS, json=body, timeout=600) as answer:
            for line in answer.iter_lines():
                if '"index":0,' in line.replace(" ", "") and not seen:
                    seen.append(len(made))
        assert seen and seen[0] <= 8
        assert len(made) == 40


def test_unknown_fields_do_not_fill_the_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    for start in (0, 2000, 4000):
        served.post(COMPLETIONS, prompt="a", max_tokens=1, **{f"unknown {start + i}": 1 for i in range(2000)})
    assert len([record for record in caplog.records if "unknown" in record.getMessage()]) <= 300


def test_only_the_first_of_many_wrong_entries_is_told(served: Served) -> None:
    refused = served.post(COMPLETIONS, prompt="a", stop_token_ids=["x"] * 20_000)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "stop_token_ids[0]"
