"""Fields that a server does not know: refused by name, another name of ours, or harmless; none is lost."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lpa_model.config import Architecture
from server.protocol.body import HARMLESS
from server.protocol.sampling import SamplingBody
from tests.serving import Served, serving
from tests.tiny import byte_tokenizer

MESSAGES = [{"role": "user", "content": "Who is there?"}]
PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "the sea"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/perplexity": {"input": "the sea"},
    "/v1/loglikelihood": {"context": "the", "continuations": [" sea"]},
    "/v1/embeddings": {"input": "the sea"},
    "/v1/hidden_states": {"input": "the sea"},
    "/v1/responses": {"input": "the sea"},
    "/tokenize": {"prompt": "the sea"},
    "/detokenize": {"tokens": [5]},
}
TEXTS = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


def refused(served: Served, path: str, param: str, **body: Any) -> dict[str, Any]:
    response = served.post(path, **{**PATHS[path], **body})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    return error


@pytest.mark.parametrize("path", PATHS)
def test_an_unknown_field_is_refused_by_name(served: Served, path: str) -> None:
    assert refused(served, path, "colour", colour="red")["code"] == "unknown_parameter"
    assert refused(served, path, "x" * 64, **{"x" * 5000: 1})["code"] == "unknown_parameter"
    assert "is model meant?" in refused(served, path, "modle", modle="tiny")["message"]
    for value in (False, 0, "", [], {}):
        refused(served, path, "colour", colour=value)
    assert served.post(path, **PATHS[path], colour=None).status_code == 200  # null is like no field


CONSTRAINTS: dict[str, Any] = {
    "stop_regex": "[a-z]",
    "logprob_token_ids": [5],
    "repeat_penalty": 1.1,
    "repeat_last_n": 64,
    "typical_p": 0.9,
    "mirostat": 2,
    "dry_multiplier": 0.8,
    "samplers": ["top_k"],
    "dynatemp_range": 0.5,
    "top_n_sigma": 1.0,
    "no_repeat_ngram_size": 2,
    "repetition_ngram_size": 3,
    "watermark": True,
    "truncate": 10,
    "top_n_tokens": 5,
    "custom_logit_processor": "x",
    "thinking_token_budget": 10,
    "vllm_xargs": {"a": 1},
    "adapter_id": "x",
    "lora_path": "x",
    "min_length": 5,
    "guided_whitespace_pattern": " ",
    "input_ids": [5],
}


@pytest.mark.parametrize("path", TEXTS)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_constraint_of_another_server_is_refused_by_name(served: Served, path: str, name: str) -> None:
    refused(served, path, name, **{name: CONSTRAINTS[name]})


def test_unknown_fields_inside_of_fields_are_refused_with_their_whole_place(served: Served) -> None:
    chats = "/v1/chat/completions"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    part = {"type": "text", "text": "a", "lang": "x"}
    wrong = {"id": "1", "function": {"name": "f", "arguments": "{"}}
    for body, param in (
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"response_format": {"type": "json_object", "shape": 1}}, "response_format.shape"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schemas": {}}}},
            "response_format.json_schema.schemas",
        ),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"structured_outputs": {"whitespace_pattern": "a"}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ({"messages": [*MESSAGES, {**MESSAGES[0], "prefix": True}]}, "messages[1].prefix"),
        ({"messages": [{"role": "user", "content": [part]}]}, "messages[0].content[0].lang"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]"),
        (
            {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [{**call, "extra": 1}]}]},
            "messages[1].tool_calls[0].extra",
        ),
        ({"messages": [*MESSAGES, {"role": "assistant", "function_call": {"name": "f"}}]}, "messages[1].function_call"),
        (
            {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [wrong]}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"messages": [{**MESSAGES[0], "tool_calls": [call]}]}, "messages[0].tool_calls"),
        ({"messages": [{**MESSAGES[0], "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ):
        refused(served, chats, param, **body)
    for kind in ("image_url", "input_audio", "refusal", "file"):
        content = [{"type": "text", "text": "a"}, {"type": kind, kind: {}}]
        refused(
            served, chats, "messages[1].content[1].type", messages=[*MESSAGES, {"role": "user", "content": content}]
        )


def test_what_is_harmless_is_taken_and_documented(served: Served) -> None:
    values = {name: {"a": "b"} if name == "metadata" else "x" for name in HARMLESS}
    for path, body in PATHS.items():
        plain = served.post(path, **body, **({"temperature": 0} if path in TEXTS else {}))
        same = served.post(path, **body, **values, **({"temperature": 0} if path in TEXTS else {}))
        assert same.status_code == 200, same.text
        for key in ("choices", "data", "tokens", "prompt"):
            assert plain.json().get(key) == same.json().get(key)
    described = served.client.get("/openapi.json").json()["info"]["description"]
    for name in (*HARMLESS, *SamplingBody.aliases):
        assert f"`{name}`" in described


def test_a_name_that_means_exactly_one_of_ours_is_that_one(served: Served) -> None:
    for path in TEXTS:
        for name, value, pattern in (
            ("guided_regex", "[ab]{3}", "[ab]{3}"),
            ("regex", "[ab]{3}", "[ab]{3}"),
            ("guided_choice", ["calm", "storm"], "calm|storm"),
            ("guided_grammar", 'start: "x"~3', "xxx"),
            ("grammar", 'root ::= "x" "y"', "xy"),
            ("ebnf", 'root ::= "x" "y"', "xy"),
            ("json_schema", {"enum": [12]}, "12"),
            ("json_schema", '{"enum": [12]}', "12"),
            ("guided_json", {"enum": [12]}, "12"),
            ("response_format", {"type": "json_object", "schema": {"enum": [12]}}, "12"),
        ):
            answer = served.post(path, **PATHS[path], **{name: value}).json()
            choice = answer["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert re.fullmatch(pattern, text), (name, text)
        for name in ("max_new_tokens", "n_predict"):
            answer = served.post(path, **PATHS[path], ignore_eos=True, stop=[], **{name: 3}).json()
            assert answer["usage"]["completion_tokens"] <= 3
            refused(served, path, name, **{name: 3, "max_tokens": 3})
        refused(served, path, "min_tokens", min_new_tokens=30, max_tokens=20)
        refused(served, path, "regex", regex="a", structured_outputs={"choice": ["b"]})
        refused(served, path, "structured_outputs", regex="a", response_format={"type": "json_object"})
        refused(served, path, "response_format.schema", response_format={"type": "text", "schema": {}})
    longest = served.complete(prompt="x", max_tokens=9, max_completion_tokens=2, ignore_eos=True)
    assert longest["usage"]["completion_tokens"] == 2  # chats' name wins
    kept = served.complete(prompt="x", no_stop_trim=True, structured_outputs={"choice": ["abc"]}, stop="b")
    assert kept["choices"][0]["text"] == "ab"


def test_the_defaults_that_a_router_adds_are_accepted(served: Served) -> None:
    """vLLM's router (vllm-router 0.1.17) writes a request anew with the defaults of SGLang's fields."""
    both = {"no_stop_trim": False, "ignore_eos": False, "skip_special_tokens": True, "return_hidden_states": False}
    reasoning = {"separate_reasoning": True, "stream_reasoning": True, "include_reasoning": True}
    added = dict(
        zip(TEXTS, ({**both, "echo": False}, {**both, **reasoning, "continue_final_message": False}), strict=True)
    )
    for path, fields in added.items():
        answer = served.post(path, **PATHS[path], **fields)
        assert answer.status_code == 200, answer.text
        refused(served, path, "return_hidden_states", return_hidden_states=True)


def test_a_prompt_is_cut_on_the_side_that_is_named(served: Served) -> None:
    ids = byte_tokenizer().encode("Once upon a time").ids
    for side, kept in (("left", ids[-4:]), ("right", ids[:4])):
        for path in TEXTS:
            body = {"truncate_prompt_tokens": 4, "truncation_side": side, "max_tokens": 1, "return_token_ids": True}
            prompt = {"prompt": ids} if path == "/v1/completions" else {"messages": MESSAGES}
            answer = served.post(path, **prompt, **body).json()
            if path == "/v1/completions":
                assert answer["choices"][0]["prompt_token_ids"] == kept
            else:
                whole = served.post("/tokenize", messages=MESSAGES).json()["tokens"]
                assert answer["prompt_token_ids"] == (whole[-4:] if side == "left" else whole[:4])
    refused(served, "/v1/completions", "truncation_side", truncation_side="middle")


def test_unknown_fields_are_ignored_and_logged_once_where_the_operator_says_so(
    tiny_checkpoints: dict[Architecture, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), serving(tiny_checkpoints["setting2"], ignore_unknown_fields=True) as server:
        for path, body in PATHS.items():
            for _ in range(2):
                many = {f"field_{i}": i for i in range(3000)}
                assert server.post(path, **body, colour="red", **many).status_code == 200
        part = {"type": "text", "text": "x", "lang": "en"}
        assert (
            server.post("/v1/chat/completions", messages=[{"role": "user", "content": [part], "id": 1}]).status_code
            == 200
        )
        assert server.post("/v1/completions", prompt="x", typical_p=0.5).status_code == 400  # known, and not harmless
    named = [record.getMessage() for record in caplog.records if "unknown field" in record.getMessage()]
    assert sum("CompletionRequest: unknown field 'colour'" in line for line in named) == 2  # of a completion, of a chat
    assert len(named) < 12 * len(PATHS)


LMDEPLOY: dict[str, Any] = {  # what its client always sends
    **{"temperature": 0.7, "top_p": 1.0, "n": 1, "max_tokens": 8, "stop": None, "stream": False, "user": None},
    **{"repetition_penalty": 1.0, "session_id": -1, "ignore_eos": False, "skip_special_tokens": True, "kwargs": {}},
    **{"spaces_between_special_tokens": True, "top_k": 40, "min_new_tokens": None, "min_p": 0.0, "logit_bias": None},
    **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "stream_options": None},
}


def test_what_clients_send_unasked_is_taken(served: Served) -> None:
    for path, more in (
        ("/v1/chat/completions", {**LMDEPLOY, "logprobs": False, "top_logprobs": 0, "max_completion_tokens": None}),
        ("/v1/chat/completions", {"store": False, "service_tier": "auto", "metadata": {}, "parallel_tool_calls": True}),
        ("/v1/chat/completions", {"tools": [], "tool_choice": "auto", "modalities": ["text"], "prompt_cache_key": "k"}),
        ("/v1/completions", {**LMDEPLOY, "suffix": None, "max_completion_tokens": 8}),
        ("/v1/completions", {"best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "echo": False}),
        ("/v1/completions", {"cache_prompt": True, "mirostat": 0, "typical_p": 1.0, "repeat_penalty": 1.0}),
    ):
        response = served.post(path, **PATHS[path], **more)
        assert response.status_code == 200, response.text


def test_the_model_may_be_left_out_and_every_answer_has_the_fingerprint(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.completions.create(model="tiny", prompt="x", max_tokens=2)
        chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2, stream=True))  # type: ignore[arg-type]
    found = {whole.system_fingerprint, *(chunk.system_fingerprint for chunk in chunks)}
    for path in list(PATHS)[:4]:
        response = served.client.post(
            path, content=json.dumps(PATHS[path]), headers={"content-type": "application/json"}
        )
        assert response.status_code == 200, response.text
        assert response.json()["model"] == "tiny"
        found.add(response.json()["system_fingerprint"])
    (fingerprint,) = found
    assert re.fullmatch(r"lpa-[\w.]+-[0-9a-f]{12}(-\w+)+-float32", str(fingerprint))


def test_the_fingerprint_is_of_the_weights(tiny_checkpoints: dict[Architecture, Path], served: Served) -> None:
    with serving(tiny_checkpoints["setting1"]) as other, serving(tiny_checkpoints["setting2"]) as same:
        ours = served.complete(prompt="x")["system_fingerprint"]
        assert same.complete(prompt="x")["system_fingerprint"] == ours
        assert other.complete(prompt="x")["system_fingerprint"] != ours


def test_context_overflow_is_in_the_words_that_clients_look_for(served: Served) -> None:
    long = "the sea " * 200
    for path, body in (
        ("/v1/completions", {"prompt": long}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 500}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 500}),
        ("/v1/perplexity", {"input": long}),
        ("/v1/loglikelihood", {"context": long, "continuations": ["x"]}),
        ("/v1/embeddings", {"input": long}),
        ("/v1/hidden_states", {"input": long}),
        ("/v1/responses", {"input": long}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 500}),
    ):
        response = served.post(path, **body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert "This model's maximum context length is 128 tokens" in response.json()["error"]["message"]


def test_tokens_of_log_probabilities_may_be_ids(served: Served) -> None:
    body = {"max_tokens": 3, "return_tokens_as_token_ids": True, "return_token_ids": True, "ignore_eos": True}
    (choice,) = served.complete(prompt="the sea", echo=True, logprobs=2, **body)["choices"]
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in ids]
    for name, top in list(zip(choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True))[1:]:
        assert name in top and all(re.fullmatch(r"token_id:\d+", key) for key in top)
    answer = served.post("/v1/chat/completions", messages=MESSAGES, logprobs=True, top_logprobs=2, **body).json()
    (choice,) = answer["choices"]
    rows = choice["logprobs"]["content"]
    assert [row["token"] for row in rows] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert b"".join(bytes(row["bytes"]) for row in rows).decode(errors="replace") == choice["message"]["content"]
    assert all(re.fullmatch(r"token_id:\d+", top["token"]) for row in rows for top in row["top_logprobs"])


def test_sixteen_stop_strings(served: Served) -> None:
    stops = [f"stop {i}" for i in range(15)] + ["sea"]
    body = {"prompt": "the", "structured_outputs": {"regex": " robot sea x{9}"}, "max_tokens": 30}
    (choice,) = served.complete(**body, stop=stops)["choices"]
    assert (choice["text"], choice["stop_reason"]) == (" robot ", "sea")
    refused(served, "/v1/completions", "stop", stop=[*stops, "more"])


@pytest.mark.parametrize("path", TEXTS)
def test_usage_in_every_chunk_counts_what_has_been_sent(served: Served, path: str) -> None:
    body = {"max_tokens": 5, "ignore_eos": True, "stream": True, "return_token_ids": True, "n": 2}
    options = {"include_usage": True, "continuous_usage_stats": True}
    text = served.post(path, **PATHS[path], **body, stream_options=options).text
    sent = 0
    for event in text.split("\n\n")[:-2]:
        chunk = json.loads(event.removeprefix("data: "))
        sent += sum(len(choice.get("token_ids") or ()) for choice in chunk["choices"])
        if any("role" in choice.get("delta", {}) for choice in chunk["choices"]):
            assert chunk["usage"]["completion_tokens"] == sent
        assert sent <= chunk["usage"]["completion_tokens"] <= sent + 1 or not chunk["choices"]
    assert sent == chunk["usage"]["completion_tokens"]
