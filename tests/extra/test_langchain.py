"""LangChain's clients against the server, without a special case."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, SecretStr

from lpa_model.config import Architecture
from tests.serving import Served, serving


class Sea(BaseModel):
    """How the sea is."""

    mood: Literal["calm", "stormy"]


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"], api_key="secret") as server:
        yield server


@pytest.fixture(scope="module")
def chat(served: Served) -> Iterator[ChatOpenAI]:
    client = ChatOpenAI(
        model="tiny",
        base_url=f"{served.url}/v1",
        api_key=SecretStr("secret"),
        max_retries=0,
        temperature=0,
        max_tokens=12,
    )
    yield client
    client.root_client.close()


def test_a_chat_is_answered_whole_streamed_and_in_batches(chat: ChatOpenAI) -> None:
    messages = [SystemMessage("A tale."), HumanMessage("Who is there?"), AIMessage("The sea."), HumanMessage("And?")]
    whole = chat.invoke(messages)
    assert isinstance(whole, AIMessage)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] <= 12
    assert whole.response_metadata["finish_reason"] in ("stop", "length")
    assert "".join(str(chunk.content) for chunk in chat.stream(messages)) == whole.content
    assert [answer.content for answer in chat.batch([messages, messages])] == [whole.content] * 2


async def test_a_chat_streams_asynchronously_with_usage(chat: ChatOpenAI) -> None:
    whole = await chat.ainvoke("Hello")
    chunks = [chunk async for chunk in chat.astream("Hello", stream_usage=True)]
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    (told,) = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata is not None]
    assert whole.usage_metadata is not None
    assert (told["input_tokens"], told["output_tokens"]) == (
        whole.usage_metadata["input_tokens"],
        whole.usage_metadata["output_tokens"],
    )


def test_logprobs_stop_and_seed(chat: ChatOpenAI) -> None:
    model = chat.bind(logprobs=True, top_logprobs=2, stop=["e"], seed=3)
    answer = model.invoke("Hello")
    rows = answer.response_metadata["logprobs"]["content"]
    assert all(len(row["top_logprobs"]) == 2 for row in rows)
    assert "e" not in str(answer.content)


def test_structured_output(chat: ChatOpenAI) -> None:
    sea = chat.model_copy(update={"max_tokens": 60}).with_structured_output(Sea, method="json_schema").invoke("Hello")
    assert isinstance(sea, Sea)


def test_completions(served: Served) -> None:
    model = OpenAI(
        model="tiny",
        base_url=f"{served.url}/v1",
        api_key=SecretStr("secret"),
        max_retries=0,
        temperature=0,
        max_tokens=8,
    )
    whole = model.invoke("The robot liked")
    assert (
        whole
        == served.client.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": "The robot liked", "temperature": 0, "max_tokens": 8},
            headers={"Authorization": "Bearer secret"},
        ).json()["choices"][0]["text"]
    )
    assert "".join(model.stream("The robot liked")) == whole
    assert model.batch(["The robot liked", "The robot liked"]) == [whole, whole]
