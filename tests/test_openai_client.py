"""The official client, synchronous and asynchronous, whole and streamed, with every parameter it has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lpa_model.config import Architecture
from tests.serving import Served, serving, until
from tests.tiny import CORPUS

CONTEXT = 128


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


def test_the_openai_client_gets_whole_and_streamed_completions(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "tiny", "prompt": ["the sea", "a gull"], "max_tokens": 6, "seed": 1, "n": 2}
        whole = client.completions.create(**asked, logprobs=1)
        assert len(whole.choices) == 4
        assert whole.usage is not None
        assert whole.usage.prompt_tokens_details is not None
        assert whole.id == f"cmpl-{whole._request_id}"
        texts = {choice.index: "" for choice in whole.choices}
        usage = None
        for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == {choice.index: choice.text for choice in whole.choices}
        assert usage is not None
        assert usage.total_tokens == whole.usage.total_tokens
        assert [m.id for m in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").object == "model"
        with pytest.raises(openai.NotFoundError) as unknown:
            client.completions.create(model="other", prompt="x")
        assert unknown.value.code == "model_not_found"
        assert "tiny" in unknown.value.message
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="tiny", prompt="x", max_tokens=CONTEXT)
        assert refused.value.code == "context_length_exceeded"


async def test_the_asynchronous_openai_client_and_many_streams(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

        async def one(i: int) -> tuple[int, str]:
            stream = await client.completions.create(
                model="tiny",
                prompt=CORPUS[i : i + 10 + i],
                max_tokens=4 + i,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            chunks = [chunk async for chunk in stream]
            return sum(len(chunk.choices) for chunk in chunks), str(chunks[-1].choices[0].finish_reason)

        results = await asyncio.gather(*(one(i) for i in range(32)))
    assert {reason for _, reason in results} == {"length"}
    until(served.idle)


FEATURES: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"temperature": 0},
    {"temperature": 1.7, "top_p": 0.7},
    {"top_p": 0},
    {"stop": "e"},
    {"stop": ["a", "th", "\n", "."]},
    {"presence_penalty": 1.5, "frequency_penalty": -0.5},
    {"logit_bias": {"50": 20, "60": -100}},
    {"user": "someone"},
    {"response_format": {"type": "json_object"}, "max_tokens": 30},
    {"extra_body": {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2}},
    {"extra_body": {"min_tokens": 6, "stop_token_ids": [40, 41], "ignore_eos": True}},
    {"extra_body": {"bad_words": ["the"], "allowed_token_ids": [*range(30, 90)]}},
    {"stop": "e", "extra_body": {"include_stop_str_in_output": True}},
    {"extra_body": {"skip_special_tokens": False, "logit_bias": {"0": 30}}},
    {"extra_body": {"priority": 1, "cache_salt": "mine", "truncate_prompt_tokens": 4}},
    {"extra_body": {"structured_outputs": {"choice": ["sea", "gull"]}}},
]
IDS = [",".join([*feature, *feature.get("extra_body", {})]) or "plain" for feature in FEATURES]


def completion(feature: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Arguments of client.completions.create; response_format is no argument of it, but the server has it."""
    asked = {"model": "tiny", "prompt": "The robot liked", "max_tokens": 12, "seed": 9, **feature, **more}
    if "response_format" in asked:
        asked["extra_body"] = {"response_format": asked.pop("response_format")}
    return asked


def chat(feature: dict[str, Any], **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "The robot liked"}]
    return {"model": "tiny", "messages": messages, "max_tokens": 12, "seed": 9, **feature, **more}


@pytest.mark.parametrize("feature", FEATURES, ids=IDS)
async def test_every_client_gets_the_same_text(served: Served, feature: dict[str, Any]) -> None:
    url = f"{served.url}/v1"
    usage: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        whole = await client.completions.create(**completion(feature))
        answer = await client.chat.completions.create(**chat(feature))
        assert whole.usage is not None
        assert answer.usage is not None
        texts = await joined(await client.completions.create(**completion(feature, **usage)), whole.usage)
        assert texts == {choice.index: choice.text for choice in whole.choices}
        contents = await joined(await client.chat.completions.create(**chat(feature, **usage)), answer.usage)
        assert contents == {choice.index: choice.message.content for choice in answer.choices}

    def synchronous() -> tuple[Any, Any]:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return client.completions.create(**completion(feature)), client.chat.completions.create(**chat(feature))

    again, again_chat = await asyncio.to_thread(synchronous)
    assert [choice.text for choice in again.choices] == [choice.text for choice in whole.choices]
    assert [choice.message for choice in again_chat.choices] == [choice.message for choice in answer.choices]
    assert [choice.finish_reason for choice in again.choices] == [choice.finish_reason for choice in whole.choices]


async def joined(stream: AsyncIterator[Any], usage: Any) -> dict[int, str]:
    """The texts of a stream by index; its usage is that of the whole answer."""
    texts: dict[int, str] = {}
    last = None
    async for chunk in stream:
        last = chunk.usage
        for choice in chunk.choices:
            piece = choice.text if hasattr(choice, "text") else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
    assert last is not None
    assert (last.prompt_tokens, last.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    return texts


def test_statuses_are_the_clients_exceptions(tiny_checkpoints: dict[Architecture, Path]) -> None:
    with serving(tiny_checkpoints["setting2"], api_key="secret", max_body_bytes=2000) as served:
        url = f"{served.url}/v1"
        with (
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.completions.create(model="tiny", prompt="x")
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
            with pytest.raises(openai.NotFoundError):
                client.moderations.create(model="tiny", input="x")
            with pytest.raises(openai.BadRequestError) as refused:
                client.chat.completions.create(model="tiny", messages=[])
            assert refused.value.param == "messages"
            assert refused.value.request_id
            with pytest.raises(openai.APIStatusError) as large:
                client.completions.create(model="tiny", prompt="x" * 3000)
            assert large.value.status_code == 413
