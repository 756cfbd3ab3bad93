"""Log-probabilities of many tokens or of all: in JSON up to a limit, as safetensors files without one."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load

from lpa_model.config import Architecture
from lpa_model.perplexity import windows
from server.routes import safetensors as route
from tests.serving import Served, serving, until
from tests.test_perplexity import convention
from tests.tiny import CORPUS, END_OF_TEXT_ID, VOCAB_SIZE, byte_tokenizer, random_model, tiny_config

PATH, COMPLETIONS = "/v1/perplexity", "/v1/completions"
ACCEPT = {"accept": "application/safetensors", "content-type": "application/json"}
TEXTS = ['The robot said: "çava 🙂" and the waves', "the", CORPUS[:100]]


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


def distributions(ids: list[int], how: Any) -> tuple[list[int], np.ndarray]:
    """The scored tokens' places, and the float64 log-probabilities of all tokens there."""
    model = random_model(tiny_config())
    places: list[int] = []
    rows = [np.zeros((0, VOCAB_SIZE))]
    for window in windows(len(ids), how):
        found = model.logits(model(torch.tensor([window.tokens(ids)])))[0].double().log_softmax(-1)
        rows.append(found[window.first_index - 1 : -1].numpy())
        places += range(window.first_scored, window.end)
    return places, np.concatenate(rows)


def ask(served: Served, path: str = PATH, **body: Any) -> httpx.Response:
    return served.client.post(path, content=json.dumps({"model": "tiny", **body}), headers=ACCEPT)


def split(body: bytes) -> list[dict[str, np.ndarray]]:
    """The files of an answer, one after another."""
    files = []
    while body:
        size = 8 + int.from_bytes(body[:8], "little")
        table = json.loads(body[8:size])
        table.pop("__metadata__")
        end = size + max(entry["data_offsets"][1] for entry in table.values())
        files.append(load(body[:end]))
        body = body[end:]
    return files


@pytest.mark.parametrize("top", [0, 5, 256, -1])
@pytest.mark.parametrize(("method", "max_length"), [("full", 128), ("rolling", 12)], ids=["one window", "many windows"])
def test_a_file_for_each_text(
    served: Served, monkeypatch: pytest.MonkeyPatch, top: int, method: Any, max_length: int
) -> None:
    monkeypatch.setattr(route, "SLICE", 5 * VOCAB_SIZE)  # five places at a time
    response = ask(served, input=TEXTS, method=method, max_length=max_length, top_logprobs=top)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/safetensors"
    how = convention(method, max_length, prefix=END_OF_TEXT_ID if method == "rolling" else None)
    files = split(response.content)
    assert len(files) == len(TEXTS)
    for text, found in zip(TEXTS, files, strict=True):
        ids = byte_tokenizer().encode(text).ids
        places, wanted = distributions(ids, how)
        wide = VOCAB_SIZE if top < 0 else min(top, VOCAB_SIZE)
        assert found["logprobs"].dtype == np.float32
        assert {found[name].dtype for name in ("ids", "tokens", "positions", "ranks")} == {np.dtype(np.uint32)}
        assert found["positions"].tolist() == places
        assert found["tokens"].tolist() == [ids[place] for place in places]
        assert found["logprobs"].shape == (len(places), wide)
        own = wanted[np.arange(len(places)), found["tokens"].astype(int)]
        np.testing.assert_allclose(found["token_logprobs"], own, atol=1e-4)
        if top < 0:
            assert found["ids"].tolist() == list(range(VOCAB_SIZE))
            np.testing.assert_allclose(found["logprobs"], wanted, atol=1e-4)
            np.testing.assert_array_equal(
                found["token_logprobs"], found["logprobs"][np.arange(len(places)), found["tokens"].astype(int)]
            )
        else:
            assert found["ids"].shape == (len(places), wide)
            named = np.take_along_axis(wanted, found["ids"].astype(int), -1)
            np.testing.assert_allclose(found["logprobs"], named, atol=1e-4)
            assert (np.diff(found["logprobs"], axis=-1) <= 0).all()
            if wide:
                assert (found["logprobs"][:, -1] >= np.sort(wanted, -1)[:, -wide] - 1e-4).all()
        np.testing.assert_allclose(found["ranks"], 1 + (wanted > own[:, None] + 1e-4).sum(-1), atol=1)
    until(served.idle)


def test_the_file_says_what_it_is(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(ask(served, input="the sea", method="rolling", top_logprobs=3).content)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["model"] == "tiny"
    assert json.loads(metadata["method"]) == "rolling"
    assert json.loads(metadata["prefix_token_id"]) == 0
    assert metadata["index"] == "0"


def test_completions_give_those_of_prompts(served: Served) -> None:
    response = ask(served, COMPLETIONS, prompt=TEXTS, max_tokens=0, prompt_logprobs=-1)
    own = split(ask(served, input=TEXTS, method="full", top_logprobs=-1).content)
    for found, wanted in zip(split(response.content), own, strict=True):
        assert found.keys() == wanted.keys()
        for name in found:
            np.testing.assert_allclose(found[name], wanted[name], atol=1e-4)
    for body, param in (
        ({"max_tokens": 1, "prompt_logprobs": 1}, "max_tokens"),
        ({"max_tokens": 0, "echo": True}, "prompt_logprobs"),
        ({"max_tokens": 0, "prompt_logprobs": 1, "echo": True}, "echo"),
        ({"max_tokens": 0, "prompt_logprobs": 1, "logprobs": 1}, "logprobs"),
        ({"max_tokens": 0, "prompt_logprobs": 1, "prompt": []}, "prompt"),
    ):
        refused = ask(served, COMPLETIONS, **{"prompt": "the sea", **body})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param


def test_json_has_as_many(served: Served) -> None:
    ids = byte_tokenizer().encode("the sea").ids
    _, wanted = distributions(ids, convention("full", 128))
    for top, wide in ((256, 256), (-1, VOCAB_SIZE)):
        whole = served.complete(
            prompt="the sea",
            max_tokens=1,
            temperature=0,
            logprobs=top,
            prompt_logprobs=top,
            echo=True,
            return_tokens_as_token_ids=True,
        )["choices"][0]
        assert [len(entry) for entry in whole["prompt_logprobs"][1:]] == [wide] * (len(ids) - 1)
        for entry, row in zip(whole["prompt_logprobs"][1:], wanted, strict=True):
            assert {int(i): told["logprob"] for i, told in entry.items()} == pytest.approx(
                {int(i): row[int(i)] for i in entry}, abs=1e-4
            )
            assert sorted(told["rank"] for told in entry.values()) == list(range(1, wide + 1))
        assert [len(entry) for entry in whole["logprobs"]["top_logprobs"][1:]] == [wide] * len(ids)
        messages = [{"role": "user", "content": "x"}]
        chat = served.post(
            "/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=top, max_tokens=2
        ).json()["choices"][0]
        assert {len(entry["top_logprobs"]) for entry in chat["logprobs"]["content"]} == {wide}
        texts = served.post(PATH, input="the sea", return_tokens=True, top_logprobs=top).json()["data"][0]["tokens"]
        assert {len(entry["top_logprobs"]) for entry in texts[1:]} == {wide}


def test_too_many_for_one_answer_are_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.routes.limits.MAX_ALTERNATIVES", 10 * VOCAB_SIZE)
    messages = [{"role": "user", "content": "x"}]
    for path, body, param in (
        (COMPLETIONS, {"prompt": "x", "logprobs": -1, "max_tokens": 11}, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "logprobs": -1, "max_tokens": 4, "n": 3}, "max_tokens"),
        (COMPLETIONS, {"prompt": CORPUS[:100], "prompt_logprobs": -1, "max_tokens": 1}, "prompt_logprobs"),
        ("/v1/chat/completions", {"messages": messages, "logprobs": True, "top_logprobs": -1}, "max_completion_tokens"),
    ):
        response = served.post(path, **body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param
    assert served.post(COMPLETIONS, prompt="x", logprobs=-1, max_tokens=10).status_code == 200
    assert served.post(COMPLETIONS, prompt=CORPUS[:100], prompt_logprobs=20, max_tokens=30).status_code == 200
    monkeypatch.setattr(route, "MAX_KEPT", 100)
    assert ask(served, input="the sea", top_logprobs=3).status_code == 200
    refused = ask(served, input=CORPUS[:200], top_logprobs=3)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_logprobs")


@pytest.mark.parametrize("name", ["return_tokens", "unit", "digest", "stream"])
def test_what_a_file_has_no_place_for_is_refused(served: Served, name: str) -> None:
    refused = ask(served, input="the sea", **{name: "word" if name == "unit" else True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
    assert "top_logprobs" in served.post(PATH, input="the sea", top_logprobs=3).json()["error"]["message"]


def test_a_reader_that_stops_reading_holds_the_engine_back(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "SLICE", 8 * VOCAB_SIZE)
    before = served.metric('lpa:scored_tokens_total{model_name="tiny"}')
    count = 4000
    body = json.dumps({"input": [CORPUS[:200]] * count, "method": "rolling", "top_logprobs": -1}).encode()
    tokens = len(byte_tokenizer().encode(CORPUS[:200]).ids)
    with socket.create_connection(("127.0.0.1", served.server.port)) as connection:
        connection.sendall(
            b"POST /v1/perplexity HTTP/1.1\r\nhost: x\r\naccept: application/safetensors\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        )
        connection.sendall(body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        seen = -1.0
        while seen != (
            seen := served.metric('lpa:scored_tokens_total{model_name="tiny"}')
        ):  # until nothing more is computed
            time.sleep(0.5)
        # what was scored, four bytes for each token of the vocabulary, is on its way in sockets' buffers
        assert (seen - before) * VOCAB_SIZE * 4 < 32 << 20 < count * tokens * VOCAB_SIZE * 4
    until(served.idle)


def test_an_error_in_the_middle_cuts_the_file_off(served: Served) -> None:
    lines = "".join(json.dumps(text) + "\n" for text in ["the sea", CORPUS * 4])
    with pytest.raises(httpx.RemoteProtocolError):
        served.client.post(
            f"{PATH}?method=full&top_logprobs=2",
            content=lines,
            headers={"accept": "application/safetensors", "content-type": "application/x-ndjson"},
        )
    until(served.idle)
    assert ask(served, input="the sea").status_code == 200
