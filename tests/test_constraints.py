"""Constraints hold together or are refused by name; none is waived, and none ends as a failure of the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers
import torch

from lpa_model.checkpoint import save_checkpoint
from server.engine.json_schema import find_fault
from tests.serving import Served, serving, until
from tests.tiny import byte_tokenizer, random_model, tiny_config

A, B, C, X = (byte_tokenizer().token_to_id(text) for text in "ABCx")
QUOTE = byte_tokenizer().token_to_id('"')
MARK = "<|mark|>"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model whose tokenizer has a special token MARK, of id 300."""
    folder = tmp_path_factory.mktemp("model")
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer().to_str())
    backend.add_special_tokens([MARK])
    save_checkpoint(folder, random_model(tiny_config(vocab_size=301)), backend, torch.float32)
    with serving(folder) as server:
        yield server


def refused(served: Served, param: str, says: str = "", status: int = 400, **body: Any) -> str:
    response = served.post("/v1/completions", prompt="The sea", **body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert says in error["message"]
    until(served.idle)
    return str(error["message"])


LISTS: list[dict[str, Any]] = [
    {"bad_words": ["A"]},
    {"bad_words": ["AA", "AB", "BA"]},
    {"min_tokens": 3, "stop_token_ids": [B]},
    {"min_tokens": 3, "stop_token_ids": [A, B]},
    {"structured_outputs": {"regex": "[AB]{3}"}},
    {"structured_outputs": {"regex": "[xy]{3}"}},
    {"structured_outputs": {"regex": "[xy]*A?"}},
    {"structured_outputs": {"choice": ["AB", "xy"]}},
    {"structured_outputs": {"json": {"type": "string"}}},
    {"logit_bias": {str(X): 100}, "repetition_penalty": 2.0},
    {"logit_bias": {str(A): -100, str(B): -100}},
    {"bad_words": ["B"], "structured_outputs": {"regex": "BA"}},
]


@pytest.mark.parametrize("beside", LISTS, ids=[" ".join(case) + str(i) for i, case in enumerate(LISTS)])
def test_allowed_token_ids_hold_beside_everything_else(served: Served, beside: dict[str, Any]) -> None:
    for seed in range(4):
        body = {
            "prompt": "The sea",
            "allowed_token_ids": [A, B],
            "max_tokens": 6,
            "seed": seed,
            "return_token_ids": True,
        }
        response = served.post("/v1/completions", **body, **beside)
        if response.status_code == 400:
            assert response.json()["error"]["param"] == "allowed_token_ids"
            assert "no token is left" in response.json()["error"]["message"]
            continue
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        assert set(choice["token_ids"]) <= {A, B}
    until(served.idle)


def test_a_text_that_may_end_does_where_no_token_is_left(served: Served) -> None:
    body = {"prompt": "x", "allowed_token_ids": [A], "max_tokens": 6, "logprobs": 1}
    (choice,) = served.complete(**body, bad_words=["AA"])["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("A", "stop", ["A"])
    (choice,) = served.complete(**body, structured_outputs={"regex": "A(x*)"})["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("A", "stop")
    (choice,) = served.complete(**{**body, "max_tokens": 9}, structured_outputs={"regex": "A{3}"}, min_tokens=6)[
        "choices"
    ]
    assert (choice["text"], choice["finish_reason"]) == ("AAA", "stop")


def test_a_text_that_may_not_end_is_refused_where_no_token_is_left(served: Served) -> None:
    body: dict[str, Any] = {"allowed_token_ids": [A], "max_tokens": 6}
    refused(served, "allowed_token_ids", "beside bad_words and min_tokens", **body, bad_words=["AA"], min_tokens=4)
    refused(served, "allowed_token_ids", "structured_outputs.regex", **body, structured_outputs={"regex": "Ax"})
    response = served.post("/v1/completions", prompt="x", stream=True, **body, structured_outputs={"regex": "AAx"})
    *_, last, _ = response.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "invalid_request_error"
    many = served.post("/v1/completions", prompt="x", n=4, **body, structured_outputs={"regex": "Ax"})
    assert many.status_code == 400


BIG = [2**53 + 1, 1234567890123456789, -1234567890123456789, 2**63, -(2**63), 2**64 - 1, 10**30 + 1, 123456789.12345679]


@pytest.mark.parametrize("number", BIG)
def test_numbers_that_would_lose_digits_are_refused_with_their_place(served: Served, number: float) -> None:
    for schema, place in (
        ({"const": number}, "/const"),
        ({"enum": ["x", number]}, "/enum/1"),
        ({"properties": {"a/b": {"enum": [[1, {"default": number}]]}}}, "/properties/a~1b/enum/0/1/default"),
        ({"$defs": {"const": {"type": "number", "minimum": number}}}, "/$defs/const/minimum"),
        ({"items": {"anyOf": [{}, {"maximum": number}]}}, "/items/anyOf/1/maximum"),
    ):
        asked = {"structured_outputs": {"json": schema}}
        says = f"at {place}: {number} would lose digits"
        refused(served, "structured_outputs.json", says, **asked)
        refused(served, "structured_outputs.json", says, structured_outputs={"json": json.dumps(schema)})


@pytest.mark.parametrize("number", [0, -7, 2**53, -(2**53), 0.1, 2.5, 1e-7, 1e22, 123456.789012345, True, None])
def test_numbers_that_keep_their_digits_are_the_answer(served: Served, number: Any) -> None:
    for schema in ({"const": number}, {"enum": [number]}, {"const": [number]}):
        (choice,) = served.complete(prompt="x", max_tokens=60, structured_outputs={"json": schema})["choices"]
        assert choice["finish_reason"] == "stop"
        found = json.loads(choice["text"])
        assert found == (
            [number]
            if isinstance(schema["const" if "const" in schema else "enum"], list) and "const" in schema
            else number
        )


def test_what_demands_nothing_may_have_any_number() -> None:
    assert find_fault({"default": 2**60, "examples": [2**61], "properties": {"default": {"type": "integer"}}}) is None
    assert find_fault({"properties": {"default": {"const": 2**60}}}) is not None
    assert find_fault({"const": {"title": 2**60}}) is not None


@pytest.mark.parametrize("text", [MARK, f"a{MARK}b", f"{MARK}{MARK}", "<|endoftext|>", "x<|endoftext|>"])
def test_the_text_of_a_special_token_is_text_inside_a_grammar(served: Served, text: str) -> None:
    escaped = text.replace("|", r"\|")
    for structured in (
        {"choice": [text]},
        {"regex": escaped},
        {"json": {"const": text}},
        {"json": {"type": "object", "properties": {text: {"const": 1}}, "required": [text]}},
        {"grammar": f"start: {json.dumps(text)}"},
        {"grammar": f"root ::= {json.dumps(text)}"},
    ):
        body = {"prompt": "x", "max_tokens": 80, "structured_outputs": structured, "return_token_ids": True}
        (choice,) = served.complete(**body)["choices"]
        found = choice["text"]
        if "json" in structured:
            value = json.loads(found) if choice["finish_reason"] == "stop" else {text: 1}
            assert value == text or text in value
        else:
            assert (found, choice["finish_reason"]) == (text, "stop")
        assert 300 not in choice["token_ids"]


def test_objects_of_thousands_of_properties(served: Served) -> None:
    names = [f"p{i}" for i in range(5000)]
    properties = {name: {"type": "integer"} for name in names}
    for schema in (
        {"type": "object", "properties": properties, "required": names, "additionalProperties": False},
        {"type": "object", "properties": {name: properties[name] for name in names[:1200]}},
    ):
        asked = {"type": "json_schema", "json_schema": {"name": "many", "schema": schema}}
        (choice,) = served.complete(prompt="x", max_tokens=40, response_format=asked)["choices"]
        assert choice["text"].lstrip().startswith("{")


@pytest.mark.parametrize(
    ("structured", "says"),
    [
        ({"json": {"type": "object", "patternProperties": {"^a": {}, "^ab": {"type": "string"}}}}, "not disjoint"),
        (
            {"json": {"properties": {"p": {"type": "object", "patternProperties": {"^a": {}, "b$": {}}}}}},
            "at /properties/p",
        ),
        ({"grammar": "start: a\na: b\nb: a"}, "only lead to one another"),
        ({"grammar": "root ::= root"}, "only lead to one another"),
        ({"grammar": 'start: A\nA: A "x"'}, "circular reference"),
        ({"json": {"const": "\ud800"}}, "at /const: half a surrogate pair"),
        ({"json": {"properties": {"a": {"enum": ["x", "\udc00"]}}}}, "at /properties/a/enum/1"),
        ({"json": {"properties": {"\ud83d": {}}}}, "at /properties: a name has half a surrogate pair"),
        ({"json": r'{"pattern": "\ud800"}'}, "at /pattern: half a surrogate pair"),
        ({"json": '{"minimum": NaN}'}, "at /minimum"),
    ],
)
def test_mistakes_in_a_grammar_are_400s_that_say_where(served: Served, structured: dict[str, Any], says: str) -> None:
    (field,) = structured
    refused(served, f"structured_outputs.{field}", says, structured_outputs=structured)


@pytest.mark.parametrize(
    "structured", [{"regex": "a\ud800"}, {"choice": ["a", "\ud800"]}, {"grammar": 'start: "\ud800"'}]
)
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(served: Served, structured: dict[str, Any]) -> None:
    response = served.post("/v1/completions", prompt="x", structured_outputs=structured)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith("structured_outputs.")


def test_a_grammar_that_fails_in_the_middle_is_the_requests_fault(served: Served) -> None:
    """No token of this vocabulary begins with what the schema demands next."""
    refused(served, "allowed_token_ids", structured_outputs={"json": {"const": "ab"}}, allowed_token_ids=[QUOTE])


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("endless", [False, True])
def test_a_stop_string_that_is_a_special_tokens_text_stops(served: Served, include: bool, endless: bool) -> None:
    name, token = ("<|endoftext|>", 0) if endless else (MARK, 300)
    body = {"prompt": "x", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "include_stop_str_in_output": include}
    (choice,) = served.complete(**body, stop=[name], logit_bias={str(token): 100}, return_token_ids=True)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"], choice["token_ids"]) == ("stop", name, [token])
    assert choice["text"] == (name if include else "")
    (choice,) = served.complete(**body, stop=["no such text"], logit_bias={str(token): 100})["choices"]
    assert choice["finish_reason"] == "length"
    (choice,) = served.complete(**body, stop=[name], min_tokens=5, logit_bias={str(token): 100}, return_token_ids=True)[
        "choices"
    ]
    assert choice["finish_reason"] == "stop" and len(choice["token_ids"]) == 6  # as of any stop string
