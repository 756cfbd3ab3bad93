"""Fifteen faults that OpenAI-compatible servers have had, each as a client would meet it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models

from lpa_model.checkpoint import save_checkpoint
from lpa_model.config import Architecture
from tests.serving import Served, serving, slow_steps, until
from tests.tiny import byte_tokenizer, random_model, tiny_config

SMILE = "🙂".encode()


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


def byte_id(byte: int) -> int:
    """The token that stands for one byte."""
    table = {byte_tokenizer().decode([i]): i for i in range(300)}
    if chr(byte) in table and byte < 128:
        return table[chr(byte)]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    character = chr(byte) if byte in printable else chr(0x100 + others.index(byte))
    found = byte_tokenizer().token_to_id(character)
    assert found is not None
    return found


def test_1_half_characters_never_leave_the_server_as_replacement_characters(served: Served) -> None:
    ids = [byte_id(byte) for byte in SMILE]
    body: dict[str, Any] = {"prompt": "x", "max_tokens": 60, "allowed_token_ids": ids, "seed": 1, "ignore_eos": True}
    text = "".join(chunk["choices"][0]["text"] for chunk in served.stream(**body))
    whole = served.complete(**body, return_token_ids=True)["choices"][0]
    byte_of = {i: bytes([b]) for i, b in zip(ids, SMILE, strict=True)}
    assert text == whole["text"] == b"".join(byte_of[i] for i in whole["token_ids"]).decode(errors="replace")
    finished = served.complete(prompt=[byte_id(ord("x")), *ids[:3]], max_tokens=1, allowed_token_ids=ids[3:])
    assert finished["choices"][0]["text"] == "🙂"


def test_2_byte_tokens_in_logprobs_are_named_and_none_is_lost(served: Served) -> None:
    answer = served.complete(prompt="x", max_tokens=1, allowed_token_ids=[byte_id(0xF0)], logprobs=20)
    columns = answer["choices"][0]["logprobs"]
    assert columns["tokens"] == ["bytes:\\xf0"]
    assert columns["top_logprobs"][0]["bytes:\\xf0"] == columns["token_logprobs"][0]
    assert len(columns["top_logprobs"][0]) in (20, 21)


def test_3_a_stop_string_that_comes_in_pieces_does_not_leak(served: Served) -> None:
    a, b = byte_id(ord("a")), byte_id(ord("b"))
    body: dict[str, Any] = {"prompt": "x", "max_tokens": 60, "allowed_token_ids": [a, b], "ignore_eos": True}
    for seed in range(8):
        free = served.complete(**body, seed=seed)["choices"][0]["text"]
        chunks = served.stream(**body, seed=seed, stop=["abba", "bbb"])
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        ends = [(free.index(stop) + len(stop), free.index(stop)) for stop in ("abba", "bbb") if stop in free]
        assert text == (free[: min(ends)[1]] if ends else free)


def test_4_usage_counts_each_prompt_once_and_all_completions(served: Served) -> None:
    usage = served.complete(prompt=[[5] * 4, [6] * 7], n=3, max_tokens=5, ignore_eos=True)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (11, 30, 41)


def test_5_echo_with_logprobs_begins_with_null_and_needs_no_completion(served: Served) -> None:
    answer = served.complete(prompt="the sea", echo=True, logprobs=1, max_tokens=0)
    columns = answer["choices"][0]["logprobs"]
    assert answer["choices"][0]["text"] == "the sea"
    assert columns["token_logprobs"][0] is columns["top_logprobs"][0] is None
    assert all(isinstance(value, float) for value in columns["token_logprobs"][1:])
    assert answer["usage"]["completion_tokens"] == 0


def test_6_offsets_count_characters_from_the_prompts_beginning_over_all_chunks(served: Served) -> None:
    body: dict[str, Any] = {"prompt": "né 🙂", "max_tokens": 12, "seed": 2, "logprobs": 0, "ignore_eos": True}
    whole = served.complete(**body)["choices"][0]["logprobs"]["text_offset"]
    assert whole[0] == 4
    assert whole == sorted(whole)
    chunks = served.stream(**body)
    assert [
        i for chunk in chunks for i in (chunk["choices"][0]["logprobs"] or {"text_offset": []})["text_offset"]
    ] == whole


def test_7_an_empty_prompt_is_refused_and_the_server_lives(served: Served) -> None:
    for prompt in ("", [], [[]], ["x", ""]):
        response = served.post("/v1/completions", prompt=prompt)
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith("prompt")
    assert served.complete(prompt="x", max_tokens=1)["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_8_a_client_that_has_gone_is_not_generated_for(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with serving(tiny_checkpoints["setting2"]) as served:
        slow_steps(served, monkeypatch, 0.05)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            served.client.post("/v1/completions", json=body, timeout=0.04 if stream else 0.2)
        until(lambda: not served.engine.has_work)
        assert served.metric('lpa:generation_tokens_total{model_name="tiny"}') < 60


def test_9_spaces_between_sentencepiece_tokens_stay(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "\u2581the": 1, "\u2581sea": 2, "s": 3, "\u2581": 4}
    vocab |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    config = tiny_config(eos_token_id=None)
    save_checkpoint(tmp_path, random_model(config), backend, torch.float32)
    with serving(tmp_path) as served:
        body: dict[str, Any] = {"prompt": [1], "max_tokens": 20, "seed": 1, "allowed_token_ids": [1, 2, 3]}
        whole = served.complete(**body, return_token_ids=True)["choices"][0]
        expected = "".join({1: " the", 2: " sea", 3: "s"}[i] for i in whole["token_ids"])
        assert whole["text"] == expected
        assert "".join(chunk["choices"][0]["text"] for chunk in served.stream(**body)) == expected


def test_10_errors_have_one_shape_and_a_code_that_is_a_string_or_null(served: Served) -> None:
    answers = [
        served.post("/v1/completions", prompt="x", max_tokens=-1),
        served.post("/v1/completions", prompt="x" * 1000),
        served.post("/v1/completions", prompt="x", model="other"),
        served.client.get("/nowhere"),
        served.client.get("/v1/completions"),
        served.client.post("/v1/completions", content=b"{"),
    ]
    assert [answer.status_code for answer in answers] == [400, 400, 404, 404, 405, 400]
    for answer in answers:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] is None or isinstance(error["code"], str)


def test_11_the_usage_chunk_comes_once_and_has_no_choices(served: Served) -> None:
    chunks = served.stream(prompt="x", max_tokens=3, n=2, ignore_eos=True, stream_options={"include_usage": True})
    assert [chunk["choices"] == [] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


def test_12_max_completion_tokens_counts_and_its_end_is_called_length(served: Served) -> None:
    response = served.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_completion_tokens=4, ignore_eos=True
    ).json()
    assert response["usage"]["completion_tokens"] == 4
    assert response["choices"][0]["finish_reason"] == "length"


def test_13_header_and_body_have_one_request_id(served: Served) -> None:
    for headers in ({}, {"x-request-id": "mine-1"}):
        response = served.client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers=headers)
        assert response.json()["id"] == f"cmpl-{response.headers['x-request-id']}"
    assert response.headers["x-request-id"] == "mine-1"


def test_14_no_route_but_the_probes_goes_without_the_key(tiny_checkpoints: dict[Architecture, Path]) -> None:
    with serving(tiny_checkpoints["setting2"], api_key="secret") as served:
        paths = json.loads(served.client.get("/openapi.json", headers={"Authorization": "Bearer secret"}).text)["paths"]
        open_paths = set()
        for path, methods in paths.items():
            for method in methods:
                status = served.client.request(method, path.replace("{", "").replace("}", "")).status_code
                if status != 401:
                    open_paths.add(path)
        assert open_paths <= {"/health", "/ready", "/metrics", "/", "/docs/reference"}
        with (
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_15_infinite_logprobs_are_numbers_that_json_has(
    served: Served, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    backend: Any = served.engine.runner.backend
    plain = backend.head

    def with_holes(hidden: Any) -> Any:
        logits = plain(hidden).clone()
        logits[..., 7:] = -1e30
        return logits

    monkeypatch.setattr(backend, "head", with_holes)
    response = served.post("/v1/completions", prompt=[5, 9, 3], echo=True, logprobs=20, max_tokens=2)
    text = response.text
    assert response.status_code == 200
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert response.json()["choices"][0]["logprobs"]["token_logprobs"][1] == -9999.0
