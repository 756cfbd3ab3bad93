"""POST /v1/chat/completions: conversations are prompts, and the answers are OpenAI's, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from lpa_model.config import Architecture
from tests.serving import Served, serving

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "A tale."}, {"role": "user", "content": "Who is there?"}]
PROMPT = "A tale.\n\nUser: Who is there?\nAssistant:"  # the default for a model without a template


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def chat(served: Served, **body: Any) -> dict[str, Any]:
    response = served.post(CHAT, **{"messages": MESSAGES, **body})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def stream(served: Served, **body: Any) -> list[dict[str, Any]]:
    response = served.post(CHAT, **{"messages": MESSAGES, "stream": True, **body})
    assert response.status_code == 200, response.text
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_an_answer_is_the_completion_of_the_conversation(served: Served, tokenizer: Tokenizer) -> None:
    answer = chat(served, max_tokens=8, temperature=0, ignore_eos=True)
    plain = served.complete(prompt=PROMPT, max_tokens=8, temperature=0, ignore_eos=True, stop="\nUser:")
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": plain["choices"][0]["text"], "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] == len(tokenizer.encode(PROMPT).ids)
    assert answer["usage"]["completion_tokens"] == 8


def test_messages_are_texts_or_parts_of_one(served: Served) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": "is there?"}]}]
    joined = [{"role": "user", "content": "Who\nis there?"}]
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "return_token_ids": True}
    first, second = (chat(served, messages=messages, **settings) for messages in (parts, joined))
    assert first["prompt_token_ids"] == second["prompt_token_ids"]
    assert first["choices"] == second["choices"]


def test_the_last_message_can_be_continued(served: Served, tokenizer: Tokenizer) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "It is the"}]
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
    answer = chat(served, messages=messages, continue_final_message=True, **settings)
    assert tokenizer.decode(answer["prompt_token_ids"]) == f"{PROMPT} It is the"
    plain = served.complete(prompt=f"{PROMPT} It is the", stop="\nUser:", **settings)
    assert answer["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]


def test_without_a_limit_the_context_is_filled(served: Served) -> None:
    answer = chat(served, temperature=0, ignore_eos=True, min_tokens=70)
    assert answer["usage"]["total_tokens"] == 128
    assert answer["choices"][0]["finish_reason"] == "length"


def test_the_newer_limit_wins(served: Served) -> None:
    answer = chat(served, max_completion_tokens=3, max_tokens=9, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("top_logprobs", [None, 0, 2])
@pytest.mark.parametrize("stop", [None, ["e"]])
def test_streamed_and_whole_answers_are_equal(
    served: Served, n: int, top_logprobs: int | None, stop: list[str] | None
) -> None:
    body: dict[str, Any] = {"n": n, "seed": 3, "max_tokens": 12, "ignore_eos": True, "stop": stop}
    body |= {"logprobs": top_logprobs is not None, "top_logprobs": top_logprobs}
    whole = chat(served, **body)
    chunks = stream(served, **body, stream_options={"include_usage": True})
    *chunks, last = chunks
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    for index, choice in enumerate(whole["choices"]):
        own = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert own[-1]["delta"] == {}
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert "".join(part["delta"]["content"] for part in own[1:-1]) == choice["message"]["content"]
        rows = [row for part in own if part["logprobs"] for row in part["logprobs"]["content"]]
        if top_logprobs is None:
            assert choice["logprobs"] is None
            assert not rows
            continue
        expected = choice["logprobs"]["content"]
        assert [row["token"] for row in rows] == [row["token"] for row in expected]
        for row, other in zip(rows, expected, strict=True):
            assert row["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
            assert len(row["top_logprobs"]) == (top_logprobs or 0)
            assert bytes(row["bytes"]).decode(errors="replace") != "" or row["token"] == ""
            if top_logprobs:
                values = [top["logprob"] for top in row["top_logprobs"]]
                assert values == sorted(values, reverse=True)
                assert row["logprob"] <= values[0]


def test_prompt_logprobs_and_token_ids(served: Served) -> None:
    answer = chat(served, max_tokens=4, prompt_logprobs=1, return_token_ids=True, temperature=0)
    plain = served.complete(prompt=PROMPT, max_tokens=4, prompt_logprobs=1, temperature=0, return_token_ids=True)
    assert answer["prompt_token_ids"] == plain["choices"][0]["prompt_token_ids"]
    assert answer["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])
    for mine, other in zip(answer["prompt_logprobs"][1:], plain["choices"][0]["prompt_logprobs"][1:], strict=True):
        assert {i: e["rank"] for i, e in mine.items()} == {i: e["rank"] for i, e in other.items()}


def test_the_official_client(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        max_completion_tokens=9,
        seed=4,
        logprobs=True,
        top_logprobs=1,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={"50": -100},
    )
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    text = ""
    for chunk in client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        max_completion_tokens=9,
        seed=4,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={"50": -100},
        stream=True,
    ):
        text += chunk.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content
    with client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], max_completion_tokens=9, seed=4, stop=text[2:4]
    ) as events:
        kinds = {event.type for event in events}
        assert {"chunk", "content.done"} <= kinds
        assert events.get_final_completion().choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x " * 200}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 128}, "max_tokens"),
        ({"max_completion_tokens": 128}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 257}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function.name"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"min_tokens": 10, "max_tokens": 5}, "min_tokens"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [300]}, "allowed_token_ids"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(served: Served, body: dict[str, Any], param: str) -> None:
    content = json.dumps({"model": "tiny", "messages": MESSAGES, **body})
    response = served.client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert str(error["param"]).startswith(param), error
    assert param.split(".")[0].split("[")[0] in error["message"]


def test_fields_at_their_default_ask_for_nothing(served: Served) -> None:
    nothing: dict[str, Any] = {
        **{"tools": [], "tool_choice": "none", "functions": [], "parallel_tool_calls": True, "modalities": ["text"]},
        **{"audio": None, "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "user": "u", "n": None},
        **{"response_format": {"type": "text"}, "logit_bias": {}, "stop": [], "echo": False, "top_logprobs": None},
    }
    plain = chat(served, max_tokens=5, temperature=0)["choices"]
    assert chat(served, max_tokens=5, temperature=0, **nothing)["choices"] == plain


TOOLS = """\
{%- if tools %}{{ 'TOOLS ' ~ tools[0].function.name ~ '\\n' }}{% endif %}
{%- for message in messages %}
{{- message.role ~ ': ' ~ message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<' ~ call.function.name ~ ' ' ~ (call.function.arguments | tojson) ~ '>' }}
{%- endfor %}
{{- (' #' ~ message.tool_call_id if message.tool_call_id else '') ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "7", "type": "function", "function": {"name": "sky", "arguments": '{"at": "sea"}'}}],
    },
    {"role": "tool", "tool_call_id": "7", "content": [{"type": "text", "text": "calm"}]},
]
SKY = {"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}


def test_calls_in_the_history_are_shown_by_a_template_that_can(tiny_checkpoints: dict[Architecture, Path]) -> None:
    with serving(tiny_checkpoints["setting2"], chat_template=TOOLS) as served:
        text = 'user: Weather?\nassistant: <sky {"at": "sea"}>\ntool: calm #7\nassistant:'
        for more, expected in (({}, text), ({"tools": [SKY], "tool_choice": "none"}, f"TOOLS sky\n{text}")):
            answer = chat(served, messages=HISTORY, max_tokens=2, return_token_ids=True, **more)
            prompt = served.post("/detokenize", tokens=answer["prompt_token_ids"]).json()["prompt"]
            assert prompt == expected
        tokens = served.post("/tokenize", messages=HISTORY, tools=[SKY]).json()["tokens"]
        assert served.post("/detokenize", tokens=tokens).json()["prompt"] == f"TOOLS sky\n{text}"


def test_calls_in_the_history_become_text_where_the_template_leaves_them_out(served: Served) -> None:
    tokens = served.post("/tokenize", messages=HISTORY).json()["tokens"]
    prompt = served.post("/detokenize", tokens=tokens).json()["prompt"]
    assert prompt == (
        'User: Weather?\nAssistant: <tool_call>\n{"name": "sky", "arguments": {"at": "sea"}}\n</tool_call>\n'
        "User: <tool_response>\ncalm\n</tool_response>\nAssistant:"
    )
    chat(served, messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": []}])


def test_no_log_probabilities_may_be_asked_for_with_a_number(served: Served) -> None:
    answer = chat(served, logprobs=False, top_logprobs=0, max_tokens=2)
    assert answer["choices"][0]["logprobs"] is None
