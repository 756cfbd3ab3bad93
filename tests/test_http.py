"""The server over HTTP: a real engine with a tiny random model, a real uvicorn, real sockets."""

from __future__ import annotations

import json
import math
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lpa_model.config import Architecture
from lpa_model.model import LPAForCausalLM
from server.routes.respond import TEXT as PLACEHOLDER
from server.routes.respond import to_json, with_text
from tests.serving import Served, serving, slow_steps, until
from tests.tiny import CORPUS, VOCAB_SIZE, random_model, tiny_config

CONTEXT = 128
TEXT = 'The robot said: "çava, 你好 🙂" and the waves'


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


@pytest.fixture(scope="module")
def model() -> LPAForCausalLM:
    return random_model(tiny_config("setting2"))


@given(st.text(st.characters(codec="utf-8")))
def test_a_chunk_by_its_text_is_the_encoders_own(text: str) -> None:
    def chunk(text: str) -> dict[str, Any]:
        return {"model": 'a "\\u0000" b', "choices": [{"index": 0, "text": text, "logprobs": None}], "usage": None}

    assert with_text(chunk(PLACEHOLDER))(text) == to_json(chunk(text))


def logprob_rows(model: LPAForCausalLM, ids: list[int]) -> torch.Tensor:
    """[len(ids), vocab]: row i is the distribution of the token after ids[i]; no cache, one sequence."""
    with torch.inference_mode():
        return torch.log_softmax(model.logits(model(torch.tensor([ids]))[0]), -1)


def greedy(model: LPAForCausalLM, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logprob_rows(model, ids)[-1].argmax()))
    return ids[-count:]


# --- perplexity ------------------------------------------------------------------------------------------------------


def nll_of_last(model: LPAForCausalLM, context: list[int], token: int) -> float:
    return -float(logprob_rows(model, context)[-1, token])


def test_full_perplexity_is_the_plain_forwards(served: Served, model: LPAForCausalLM, tokenizer: Tokenizer) -> None:
    texts = [CORPUS[:100], TEXT, "ab"]
    answer = served.post("/v1/perplexity", input=texts).json()
    sums, counts = [], []
    for text in texts:
        ids = tokenizer.encode(text).ids
        sums.append(sum(nll_of_last(model, ids[:i], ids[i]) for i in range(1, len(ids))))
        counts.append(len(ids) - 1)
    assert answer["object"] == "perplexity"
    assert answer["model"] == "tiny"
    for i, entry in enumerate(answer["data"]):
        assert (entry["index"], entry["num_tokens"]) == (i, counts[i])
        assert entry["nll_sum"] == pytest.approx(sums[i], rel=1e-5)
        assert entry["perplexity"] == pytest.approx(math.exp(sums[i] / counts[i]), rel=1e-4)
    aggregate = answer["aggregate"]
    assert aggregate["num_tokens"] == sum(counts)
    assert aggregate["perplexity"] == pytest.approx(math.exp(sum(sums) / sum(counts)), rel=1e-4)
    assert answer["usage"] == {"prompt_tokens": sum(counts) + 3, "total_tokens": sum(counts) + 3}


def test_sliding_perplexity_sees_the_context_that_was_asked_for(
    served: Served, model: LPAForCausalLM, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(CORPUS).ids
    assert len(ids) > CONTEXT
    max_length, stride = 24, 10
    expected = 0.0
    for i in range(1, len(ids)):
        window = 0 if i < max_length else math.ceil((i - max_length + 1) / stride)  # the first whose end is past i
        expected += nll_of_last(model, ids[window * stride : i], ids[i])
    for text in (CORPUS, ids):
        answer = served.post("/v1/perplexity", input=text, method="sliding", max_length=max_length, stride=stride)
        (entry,) = answer.json()["data"]
        assert entry["num_tokens"] == len(ids) - 1
        assert entry["nll_sum"] == pytest.approx(expected, rel=1e-5)
    longest = served.post("/v1/perplexity", input=CORPUS, method="sliding").json()["aggregate"]
    assert longest["num_tokens"] == len(ids) - 1


def test_more_windows_than_the_queue_holds(tiny_checkpoints: dict[Architecture, Path]) -> None:
    with serving(tiny_checkpoints["setting2"], max_num_seqs=2, max_queue=0) as server:
        answer = server.post("/v1/perplexity", input=CORPUS, method="sliding", max_length=8, stride=4)
        assert answer.status_code == 200
        prompts = ["the sea"] * 12
        assert len(server.complete(prompt=prompts, max_tokens=2)["choices"]) == 12
        until(server.idle)


def test_a_model_that_gives_no_numbers_is_an_error_not_an_answer(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"]) as server:
        backend: Any = server.engine.runner.backend
        head = backend.head
        monkeypatch.setattr(backend, "head", lambda hidden: head(hidden) * torch.nan)
        answer = server.post("/v1/perplexity", input="the sea")
        assert answer.status_code == 500
        for body in ({"max_tokens": 3}, {"max_tokens": 0, "echo": True, "logprobs": 1}, {"prompt_logprobs": 0}):
            answer = server.post("/v1/completions", prompt="the sea", **body)
            assert answer.status_code == 500
            assert "not a finite number" in answer.json()["error"]["message"]
        until(server.idle)
        assert server.client.get("/health").status_code == 200


# --- refusals --------------------------------------------------------------------------------------------------------

COMPLETIONS, PERPLEXITY = "/v1/completions", "/v1/perplexity"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"model": 5, "prompt": "x"}, "model"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": 5}, "prompt"),
        (COMPLETIONS, {"prompt": {"text": "x"}}, "prompt"),
        (COMPLETIONS, {"prompt": ["x", ""]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": ["x", [5]]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [5, "x"]}, "prompt"),
        (COMPLETIONS, {"prompt": [5, True]}, "prompt"),
        (COMPLETIONS, {"prompt": [[5], [-1]]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [VOCAB_SIZE]}, "prompt"),
        (COMPLETIONS, {"prompt": "\ud800"}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * CONTEXT}, "max_tokens"),
        (COMPLETIONS, {"prompt": [[5], [5] * (CONTEXT + 1)], "max_tokens": 1}, "prompt[1]"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": -1}, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "16"}, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "temperature": 2.1}, "temperature"),
        (COMPLETIONS, {"prompt": "x", "temperature": True}, "temperature"),
        (COMPLETIONS, {"prompt": "x", "top_p": 1.1}, "top_p"),
        (COMPLETIONS, {"prompt": "x", "top_k": -2}, "top_k"),
        (COMPLETIONS, {"prompt": "x", "n": 0}, "n"),
        (COMPLETIONS, {"prompt": "x", "n": 129}, "n"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 257}, "logprobs"),
        (COMPLETIONS, {"prompt": "x", "logprobs": True}, "logprobs"),
        (COMPLETIONS, {"prompt": "x", "stop": list("abcdefghijklmnopq")}, "stop"),
        (COMPLETIONS, {"prompt": "x", "stop": ["a", 1]}, "stop[1]"),
        (COMPLETIONS, {"prompt": "x", "stop": ""}, "stop[0]"),
        (COMPLETIONS, {"prompt": "x", "stop": "\udfff"}, "stop[0]"),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        (COMPLETIONS, {"prompt": "x", "min_tokens": 17}, "min_tokens"),
        (COMPLETIONS, {"prompt": "x", "seed": 2**63}, "seed"),
        (COMPLETIONS, {"prompt": "x", "stream": "yes"}, "stream"),
        (COMPLETIONS, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"prompt": "x", "stream": True, "stream_options": 1}, "stream_options"),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix"),
        (COMPLETIONS, {"prompt": "x", "n": 3, "best_of": 2}, "best_of"),
        (PERPLEXITY, {}, "input"),
        (PERPLEXITY, {"input": ""}, "input"),
        (PERPLEXITY, {"input": [5]}, "input"),
        (PERPLEXITY, {"input": ["x", ""]}, "input"),
        (PERPLEXITY, {"input": [5] * (CONTEXT + 1)}, "input"),
        (PERPLEXITY, {"input": [5] * 20, "max_length": 10}, "input"),
        (PERPLEXITY, {"input": [[5, 5], [5, VOCAB_SIZE]]}, "input[1]"),
        (PERPLEXITY, {"input": "two", "method": "other"}, "method"),
        (PERPLEXITY, {"input": "two", "stride": 3}, "stride"),
        (PERPLEXITY, {"input": "two", "method": "sliding", "max_length": 8, "stride": 8}, "stride"),
        (PERPLEXITY, {"input": "two", "method": "sliding", "stride": 0}, "stride"),
        (PERPLEXITY, {"input": "two", "max_length": CONTEXT + 1}, "max_length"),
        (PERPLEXITY, {"input": "two", "max_length": 1}, "max_length"),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    response = served.client.post(path, content=json.dumps({"model": "tiny", **body}), headers=JSON)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert_error_object(response)


JSON = {"content-type": "application/json"}


def assert_error_object(response: httpx.Response) -> None:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert isinstance(body["error"]["type"], str)
    assert isinstance(body["error"]["code"], str | None)
    assert response.headers["x-request-id"]


def test_fields_at_their_default_ask_for_nothing(served: Served) -> None:
    plain = served.complete(prompt="the sea", temperature=0)
    nulls = ["max_tokens", "n", "stop", "seed", "suffix", "logit_bias", "best_of", "stream", "stream_options", "user"]
    same = served.complete(
        prompt="the sea",
        temperature=0,
        presence_penalty=0,
        frequency_penalty=0.0,
        **dict.fromkeys(nulls, None),
    )
    assert same["choices"] == plain["choices"]
    assert served.complete(prompt="the sea", temperature=0, best_of=1, logit_bias={})["choices"] == plain["choices"]
    assert len(served.complete(prompt="the sea", n=2, best_of=2)["choices"]) == 2


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b'{"model": "tiny", "prompt": "x', JSON),
        (b'{"model": "tiny", "prompt": "\xff"}', JSON),
        (b"[" * 100_000, JSON),
        (b"[1]", JSON),
        (b"", JSON),
        (b'{"model": "tiny", "prompt": "x"}', {"content-type": "text/plain"}),
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(served: Served, content: bytes, headers: dict[str, str]) -> None:
    for path in (COMPLETIONS, PERPLEXITY):
        response = served.client.post(path, content=content, headers=headers)
        assert response.status_code == 400
        assert_error_object(response)


def test_unknown_routes_models_and_methods(served: Served) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/other/one", 404),
        ("POST", "/v1/completions/", 404),
    ):
        response = served.client.request(method, path)
        assert response.status_code == status
        assert_error_object(response)
    assert served.client.get(COMPLETIONS).headers["allow"] == "POST"
    for path, body in ((COMPLETIONS, {"prompt": "x"}), (PERPLEXITY, {"input": "xy"})):
        for name in ("other", "\ud800"):
            content = json.dumps({"model": name, **body})
            response = served.client.post(path, content=content, headers=JSON)
            assert response.status_code in (400, 404)
            assert response.json()["error"]["param"] == "model"
            assert_error_object(response)


def test_the_server_lives_on_after_every_refusal(served: Served) -> None:
    assert served.client.get("/health").json() == {"status": "ok"}
    assert served.client.get("/ready").status_code == 200
    assert served.client.get("/version").json()["version"]
    until(served.idle)


# --- around a request ------------------------------------------------------------------------------------------------


def test_the_request_id_is_taken_made_and_echoed(served: Served) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    given = served.client.post(COMPLETIONS, json=body, headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    assert given.json()["id"] == "cmpl-mine-1"
    first, second = served.post(COMPLETIONS, prompt="x"), served.post(COMPLETIONS, prompt="x")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    strange = served.client.get("/health", headers={"x-request-id": "<a b>"})
    assert strange.headers["x-request-id"] not in ("", "<a b>")


def test_one_request_id_may_be_used_twice_at_once(served: Served) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 30, "ignore_eos": True}
        answers.append(httpx.post(served.url + COMPLETIONS, json=body, headers={"x-request-id": "twice"}))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 4


def test_the_access_log_names_request_and_status(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "server.middleware")
    served.client.get("/v1/nothing", headers={"x-request-id": "logged-1"})
    served.client.get("/health", headers={"x-request-id": "a-probe"})
    lines = [record.getMessage() for record in caplog.records if record.name == "server.middleware"]
    assert len(lines) == 1
    assert "GET" in lines[0]
    assert "/v1/nothing" in lines[0]
    assert "404" in lines[0]
    assert "logged-1" in lines[0]


def test_a_key_is_needed_everywhere_but_for_probes_and_metrics(tiny_checkpoints: dict[Architecture, Path]) -> None:
    with serving(tiny_checkpoints["setting2"], api_key="secret") as server:
        for path in ("/health", "/ready", "/metrics"):
            assert server.client.get(path).status_code == 200
        closed = ["/v1/models", "/version", "/docs/nothing", "/openapi.json", "/nothing", "/v1/models/tiny"]
        for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"authorization": "Bearer"}):
            for path in closed:
                response = server.client.get(path, headers=wrong)
                assert response.status_code == 401, path
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert_error_object(response)
            assert server.client.post(COMPLETIONS, json={}, headers=wrong).status_code == 401
        right = {"authorization": "Bearer secret"}
        assert server.client.get("/v1/models", headers=right).status_code == 200


def test_a_body_over_the_limit_is_a_413(tiny_checkpoints: dict[Architecture, Path]) -> None:
    with serving(tiny_checkpoints["setting2"], max_body_bytes=2000) as server:
        body = json.dumps({"model": "tiny", "prompt": "x", "user": "y" * 3000}).encode()
        pieces = (body[i : i + 100] for i in range(0, len(body), 100))
        for content in (body, pieces):  # with a content-length, and in chunks without one
            response = server.client.post(COMPLETIONS, content=content, headers=JSON)
            assert response.status_code == 413
            assert "2000" in response.json()["error"]["message"]
            assert_error_object(response)
        assert server.complete(prompt="x", user="y" * 1000)["choices"]


def test_a_fault_of_the_server_is_a_500(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> list[int]:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(served.engine.tokenizer, "encode", broken)
    response = served.post(COMPLETIONS, prompt="x")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert_error_object(response)


# --- the life of a request -------------------------------------------------------------------------------------------


def leave_early(served: Served, *, stream: bool, body: dict[str, Any]) -> None:
    """Send a request on a socket of its own and close it once the engine works on it."""
    content = json.dumps({"model": "tiny", "stream": stream, **body}).encode()
    head = f"POST /v1/{'completions' if 'prompt' in body else 'perplexity'} HTTP/1.1\r\nhost: x\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=600) as connection:
        connection.sendall(head.encode() + content)
        until(lambda: served.engine.has_work)
        if stream:
            assert b"200" in connection.recv(4096)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [{"prompt": ["x", "y"], "n": 2, "max_tokens": 120, "ignore_eos": True}])
def test_a_client_that_leaves_stops_costing(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch, stream: bool, body: dict[str, Any]
) -> None:
    with serving(tiny_checkpoints["setting2"]) as server:
        slow_steps(server, monkeypatch, 0.05)
        leave_early(server, stream=stream, body=body)
        until(server.idle)
        until(lambda: server.metric('lpa:request_success_total{finished_reason="abort",model_name="tiny"}') == 4)
        assert server.metric('lpa:request_success_total{finished_reason="length",model_name="tiny"}') == 0


def test_a_client_that_leaves_a_perplexity_stops_costing(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"], max_num_seqs=1) as server:
        slow_steps(server, monkeypatch, 0.05)
        leave_early(server, stream=False, body={"input": CORPUS, "method": "sliding", "max_length": 4, "stride": 2})
        until(server.idle)
        assert server.metric('lpa:request_success_total{finished_reason="length",model_name="tiny"}') < 40


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails_fails_its_requests_and_the_server_lives_on(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with serving(tiny_checkpoints["setting2"]) as server:
        run, steps = server.engine.runner.run, 0

        def fails_once(batch: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == 4:
                raise RuntimeError("out of luck")
            return run(batch)

        monkeypatch.setattr(server.engine.runner, "run", fails_once)
        response = server.post(COMPLETIONS, prompt="x", max_tokens=20, logprobs=0, ignore_eos=True, stream=stream)
        if stream:
            assert response.status_code == 200
            *chunks, error, end = response.text.split("\n\n")
            choices = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
            assert sum(len(choice["logprobs"]["tokens"]) for choice in choices) == 3
            assert end == ""
            body = json.loads(error.removeprefix("data: "))
            assert set(body["error"]) == {"message", "type", "param", "code"}
            assert body["error"]["code"] == "engine_error"
        else:
            assert response.status_code == 500
            assert_error_object(response)
        assert server.client.get("/health").status_code == 200
        assert server.complete(prompt="x", max_tokens=20)["choices"]
        until(server.idle)


def test_a_dead_engine_turns_health_to_503(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"]) as server:

        def broken(_: Any) -> Any:
            raise RuntimeError("no more")

        monkeypatch.setattr(server.engine.runner, "run", broken)
        monkeypatch.setattr(server.server.engine, "_on_death", None)  # the port stays open
        assert [server.post(COMPLETIONS, prompt="x").status_code for _ in range(3)] == [500] * 3
        until(lambda: server.client.get("/health").status_code == 503)
        for response in (server.client.get("/ready"), server.post(COMPLETIONS, prompt="x")):
            assert response.status_code == 503
            assert_error_object(response)


def test_a_full_queue_is_a_429_with_retry_after(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"], max_num_seqs=1, max_queue=1) as server:
        slow_steps(server, monkeypatch, 0.02)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 40, "ignore_eos": True}
        threads = [
            threading.Thread(target=httpx.post, args=(server.url + COMPLETIONS,), kwargs={"json": body, "timeout": 20})
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(server.server.engine._mailboxes) == 2)
        for stream in (False, True):
            refused = server.post(COMPLETIONS, prompt="x", stream=stream)
            assert refused.status_code == 429
            assert refused.headers["retry-after"]
            assert_error_object(refused)
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("path", [COMPLETIONS, PERPLEXITY])
def test_a_request_that_takes_too_long_is_cut_off(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    with serving(tiny_checkpoints["setting2"], request_timeout=0.2, max_num_seqs=1) as server:
        slow_steps(server, monkeypatch, 0.05)
        body: dict[str, Any] = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}
        if path == PERPLEXITY:
            body = {"input": CORPUS, "method": "sliding", "max_length": 8}
        response = server.post(path, **body)
        assert response.status_code == 504
        assert response.headers["x-should-retry"] == "false"
        assert_error_object(response)
        until(server.idle)


def test_a_signal_drains_before_the_port_closes(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"]) as server:
        slow_steps(server, monkeypatch, 0.03)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 40, "ignore_eos": True, "stream": True}
        with server.client.stream("POST", COMPLETIONS, json=body) as running:
            lines = running.iter_lines()
            next(lines)
            server.server.handle_exit(signal.SIGTERM, None)
            until(lambda: not server.server.engine.accepting)
            with httpx.Client(base_url=server.url) as other:
                assert other.get("/ready").status_code == 503
                assert other.get("/health").status_code == 200
                assert other.post(COMPLETIONS, json=body).status_code == 503
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) > 20
        until(lambda: server.server.should_exit)


def test_drain_ends_what_does_not_finish(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"], drain_timeout=0.1) as server:
        slow_steps(server, monkeypatch, 0.05)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True}
        with server.client.stream("POST", COMPLETIONS, json=body) as running:
            lines = running.iter_lines()
            next(lines)
            server.server.handle_exit(signal.SIGTERM, None)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "unavailable"
        until(lambda: server.server.should_exit)


def test_metrics_count_what_was_asked(tiny_checkpoints: dict[Architecture, Path]) -> None:
    with serving(tiny_checkpoints["setting2"]) as server:
        usage = server.complete(prompt=["the sea", "a gull"], max_tokens=5, ignore_eos=True)["usage"]
        scored = server.post(PERPLEXITY, input=CORPUS[:50]).json()["aggregate"]["num_tokens"]
        label = '{model_name="tiny"}'
        assert server.metric(f"lpa:generation_tokens_total{label}") == usage["completion_tokens"] == 10
        assert server.metric(f"lpa:scored_tokens_total{label}") == scored
        assert server.metric(f"lpa:time_to_first_token_seconds_count{label}") == 2
        assert server.metric(f"lpa:inter_token_latency_seconds_count{label}") == 8
        assert server.metric(f"lpa:e2e_request_latency_seconds_count{label}") == 3
        assert server.metric(f"lpa:num_requests_running{label}") == 0
