"""Calls of functions over HTTP: chosen, required and named, whole and streamed, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from tokenizers import AddedToken, Tokenizer

from lpa_model.checkpoint import save_checkpoint
from server.engine.tool_grammar import MAX_CALLS
from server.protocol.tools import MAX_TOOL_BYTES, MAX_TOOLS
from tests.serving import Served, serving, until
from tests.tiny import byte_tokenizer, random_model, tiny_config

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Weather?"}]
MOODS = {"type": "object", "properties": {"mood": {"enum": ["calm", "stormy"]}}, "required": ["mood"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "sky", "description": "How it is.", "parameters": MOODS}},
    {"type": "function", "function": {"name": "now"}},
]
SKY = {"type": "function", "function": {"name": "sky"}}
QWEN = """\
{%- for tool in tools or [] %}{{ tool.function.name }};{% endfor %}
{%- for message in messages %}
{{- message.role ~ ': ' ~ message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- (call.function.arguments | tojson) ~ '}\\n</tool_call>' }}
{%- endfor %}
{{- '\\n' }}
{%- endfor %}
{{- 'assistant: ' }}"""
MISTRAL = """\
{%- for tool in tools or [] %}{{ tool.function.name }};{% endfor %}
{%- for message in messages %}
{{- message.role ~ message.content ~ ('[TOOL_CALLS] ' ~ message.tool_calls | tojson if message.tool_calls else '') }}
{%- endfor %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokenizer has the tokens that begin calls: Qwen's is text, Mistral's is special."""
    tokenizer = Tokenizer.from_str(byte_tokenizer().to_str())
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    found = tmp_path_factory.mktemp("tools") / "model"
    config = tiny_config(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=2048)
    save_checkpoint(found, random_model(config), tokenizer, torch.float32)
    return found


@pytest.fixture(scope="module", params=["none", "qwen", "mistral"])
def served(folder: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    templates: dict[str, Any] = {"none": {}, "qwen": {"chat_template": QWEN}, "mistral": {"chat_template": MISTRAL}}
    with serving(folder, **templates[request.param]) as server:
        yield server
        until(server.idle)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[Served]:
    with serving(folder) as server:
        yield server


def ask(served: Served, **body: Any) -> dict[str, Any]:
    answer = served.answer(CHAT, **{"messages": MESSAGES, "tools": TOOLS, "max_tokens": 400, **body})
    found: dict[str, Any] = answer["choices"][0]
    return found


def begin(served: Served) -> dict[str, float]:
    """A bias that makes a random model begin a call wherever it may."""
    tokenizer = served.server.engine.tokenizer
    return {str(tokenizer.backend.token_to_id(tokenizer.call_syntax.trigger)): 100.0}


def check_call(call: dict[str, Any]) -> None:
    assert call["type"] == "function" and call["id"]
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "now":
        assert arguments == {}
    else:
        assert call["function"]["name"] == "sky" and arguments in ({"mood": "calm"}, {"mood": "stormy"})


def test_what_is_required_is_called_at_once(served: Served) -> None:
    seed = 1
    named = ask(served, tool_choice=SKY, seed=seed)
    (call,) = named["message"]["tool_calls"]
    check_call(call)
    assert (call["function"]["name"], named["finish_reason"], named["message"]["content"]) == ("sky", "stop", None)
    for more in ({}, {"parallel_tool_calls": False}):
        required = ask(served, tool_choice="required", seed=seed, max_tokens=1500, **more)
        assert required["finish_reason"] == "tool_calls" and required["message"]["content"] is None
        calls = required["message"]["tool_calls"]
        for call in calls:
            check_call(call)
        assert len({call["id"] for call in calls}) == len(calls)
        if more or not served.server.engine.tokenizer.shows_tools:
            assert len(calls) == 1
    some = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [SKY]}}
    calls = ask(served, tool_choice=some, seed=seed, parallel_tool_calls=False)["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["sky"]


def test_the_model_chooses_between_text_and_calls(served: Served) -> None:
    called = ask(served, logit_bias=begin(served), max_tokens=1500)
    assert called["finish_reason"] == "tool_calls" and called["message"]["content"] is None
    for call in called["message"]["tool_calls"]:
        check_call(call)
    tokenizer = served.server.engine.tokenizer
    on = {**begin(served), str(tokenizer.eos_token_id): -100.0}  # as long as the grammar lets it
    calls = ask(served, tools=TOOLS[1:], logit_bias=on, max_tokens=1600)["message"]["tool_calls"]
    if tokenizer.chat_template == QWEN:  # each call begins with the token
        assert len(calls) == MAX_CALLS
    elif not tokenizer.shows_tools:
        assert len(calls) == 1
    never = {token: -100.0 for token in begin(served)}
    for more in ({"logit_bias": never}, {"tool_choice": "none"}):
        spoken = ask(served, max_tokens=9, seed=1, ignore_eos=True, **more)
        assert spoken["finish_reason"] == "length" and len(spoken["message"]["content"]) > 3
        assert "tool_calls" not in spoken["message"]


@pytest.mark.parametrize(("tool_choice", "biased"), [("auto", True), ("auto", False), ("required", True), (SKY, True)])
@pytest.mark.parametrize("max_tokens", [30, 1500])
def test_streamed_and_whole_answers_are_equal(served: Served, tool_choice: Any, biased: bool, max_tokens: int) -> None:
    if not biased and tool_choice == "auto":
        max_tokens = min(max_tokens, 60)
    if tool_choice == "required":
        max_tokens = min(max_tokens, 300)  # within one of several calls
    body: dict[str, Any] = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": tool_choice, "max_tokens": max_tokens}
    body |= {"seed": 5, "logit_bias": begin(served) if biased else {}, "model": "tiny"}
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        (whole,) = client.chat.completions.create(**body).choices
        chunks = list(client.chat.completions.create(**body, stream=True))
    own = [choice for chunk in chunks for choice in chunk.choices]
    assert own[0].delta.role == "assistant" and own[0].delta.content is None
    assert "".join(choice.delta.content or "" for choice in own) == (whole.message.content or "")
    assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + [whole.finish_reason]
    found: list[list[str]] = []
    for delta in (entry for choice in own for entry in choice.delta.tool_calls or ()):
        assert delta.function is not None and delta.function.arguments is not None
        if delta.index == len(found):
            assert delta.id and delta.type == "function" and delta.function.name
            found.append([delta.function.name, ""])
        else:
            assert delta.id is None and delta.function.name is None and delta.index == len(found) - 1
        found[-1][1] += delta.function.arguments
    assert found == [[call.function.name, call.function.arguments] for call in whole.message.tool_calls or ()]  # type: ignore[union-attr]


def test_a_call_that_is_cut_off_is_delivered_as_far_as_it_goes(served: Served) -> None:
    endings = set()
    for max_tokens in (1, 5, 12, 25, 60, 200):
        choice = ask(served, tool_choice=SKY, max_tokens=max_tokens, seed=2)
        calls = choice["message"].get("tool_calls", [])
        endings.add(choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            check_call(calls[0])
            break
        if calls:
            assert calls[0]["function"]["name"] == "sky"
    assert endings == {"length", "stop"}


def test_log_probabilities_and_ids_come_with_calls(plain: Served) -> None:
    body = {"tool_choice": SKY, "seed": 1, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    whole = ask(plain, **body)
    check_call(whole["message"]["tool_calls"][0])
    assert len(whole["logprobs"]["content"]) == len(whole["token_ids"])
    response = plain.post(CHAT, messages=MESSAGES, tools=TOOLS, max_tokens=400, stream=True, **body)
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    rows = [row for chunk in chunks for row in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [row["token"] for row in rows] == [row["token"] for row in whole["logprobs"]["content"]]


def test_a_text_without_calls_may_have_a_schema(plain: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "sea", "schema": MOODS, "strict": True}}
    spoken = ask(plain, response_format=form, logit_bias={token: -100 for token in begin(plain)}, seed=1)
    if "tool_calls" not in spoken["message"]:  # the model's choice; without a token for it, a call begins with "<"
        assert set(json.loads(spoken["message"]["content"])) == {"mood"}
    called = ask(plain, response_format=form, logit_bias=begin(plain))
    check_call(called["message"]["tool_calls"][0])
    wrong = {"type": "json_schema", "json_schema": {"name": "sea", "schema": {"type": "colour"}}}
    response = plain.post(CHAT, messages=MESSAGES, tools=TOOLS, response_format=wrong)
    assert response.json()["error"]["param"] == "response_format.json_schema.schema"


def test_the_prompt_shows_the_tools_and_what_was_called(served: Served) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "sky", "arguments": '{"mood": "calm"}'}}
    history = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "abcdefghi"}]
    history[-1]["content"] = "So it is."
    prompts = []
    for choice in ("none", "auto", "required"):
        response = served.post(
            CHAT, messages=history, tools=TOOLS, tool_choice=choice, max_tokens=1, return_token_ids=True
        )
        ids = response.json()["prompt_token_ids"]
        prompts.append(served.post("/detokenize", tokens=ids).json()["prompt"])
    ids = served.post("/tokenize", messages=history, tools=TOOLS).json()["tokens"]
    assert {served.post("/detokenize", tokens=ids).json()["prompt"], *prompts} == {prompts[0]}
    assert "sky" in prompts[0] and "now" in prompts[0] and '{"mood": "calm"}' in prompts[0]
    assert prompts[0].index("Weather?") < prompts[0].index('{"mood": "calm"}') < prompts[0].index("So it is.")


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


OPEN = {"type": "object", "properties": {}, "additionalProperties": True}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].custom", ""),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": [TOOLS[0], {"type": "function"}]}, "tools[1].function", ""),
        ({"tools": [function(name="a b")]}, "tools[0].function.name", ""),
        ({"tools": [function(), function()]}, "tools[1].function.name", "twice"),
        ({"tools": [function(colour=1)]}, "tools[0].function.colour", ""),
        (
            {"tools": [function(name=f"f{i}") for i in range(MAX_TOOLS + 1)]},
            "tools",
            f"129 functions are more than {MAX_TOOLS}",
        ),
        (
            {"tools": [TOOLS[0], function(description="x" * MAX_TOOL_BYTES)]},
            "tools[1].function.parameters",
            f"more than {MAX_TOOL_BYTES} bytes",
        ),
        (
            {"tools": [*TOOLS, function(), function(name="g", parameters={"type": "string"})]},
            "tools[3].function.parameters",
            "must be a JSON schema of type 'object', not 'string'",
        ),
        (
            {"tools": [TOOLS[0], function(parameters={"properties": {"a": {"type": "colour"}}})]},
            "tools[1].function.parameters",
            "at /properties/a: ",
        ),
        ({"tools": [function(parameters=OPEN, strict=True)]}, "tools[0].function.parameters", "to be false"),
        ({"tool_choice": "maybe"}, "tool_choice", "must be 'none', 'auto', 'required'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "is required"),
        ({"tool_choice": {"type": "function", "function": {"name": "moon"}}}, "tool_choice.function.name", "'moon'"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [SKY, function()]}}},
            "tool_choice.allowed_tools.tools[1].function.name",
            "'f'",
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [], "tool_choice": SKY}, "tool_choice", "needs tools"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "does not go with tools"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"function_call": {"name": "f"}}, "function_call", "not supported"),
    ],
)
def test_what_cannot_be_called_is_a_400_that_names_the_field(
    plain: Served, body: dict[str, Any], param: str, says: str
) -> None:
    response = plain.post(CHAT, **{"messages": MESSAGES, "tools": TOOLS, "max_tokens": 5, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and error["message"].startswith(f"{param}: "), error
    assert says in error["message"]
