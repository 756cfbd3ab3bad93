"""Agents of AG2, AutoGen and Haystack that call functions, unchanged against SmolLM2, whose template knows no tools.

`tool_choice` is required where a call must come: so small a model need not call by itself.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from typing import Any

os.environ |= {"AUTOGEN_USE_DOCKER": "0", "HAYSTACK_TELEMETRY_ENABLED": "False"}

import pytest

from tests.extra.function_calls import ASKED, BUSY, NAME, City, folder, source, url

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what they import
    import autogen
    from autogen_agentchat.agents import AssistantAgent
    from autogen_core.models import ModelFamily, UserMessage
    from autogen_core.tools import FunctionTool
    from autogen_ext.models.openai import OpenAIChatCompletionClient
    from haystack.components.agents import Agent
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage, StreamingChunk
    from haystack.tools import create_tool_from_function
    from haystack.utils import Secret

pytestmark = pytest.mark.filterwarnings("default")  # the clients' own
__all__ = ["folder", "source", "url"]  # fixtures
REQUIRED = {"tool_choice": "required"}


def weather(city: str) -> str:
    """The weather of a city."""
    return f"It is sunny in {city}."


# --- AG2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_ag2s_agents_call_and_answer(url: str, stream: bool) -> None:
    config: dict[str, Any] = {"model": NAME, "base_url": url, "api_key": "none", "price": [0, 0]}
    config |= {"temperature": 0, "max_tokens": 60, "timeout": 600, "stream": stream}

    def chat(more: dict[str, Any], turns: int) -> list[dict[str, Any]]:
        user = autogen.ConversableAgent("user", llm_config=False, human_input_mode="NEVER")
        helper = autogen.ConversableAgent("helper", llm_config=autogen.LLMConfig({**config, **more}))
        autogen.register_function(weather, caller=helper, executor=user, description="The weather of a city.")
        return user.initiate_chat(helper, message=ASKED, max_turns=turns, silent=True).chat_history

    asked, called, answered, *_ = chat({"extra_body": REQUIRED}, 2)
    assert asked["content"] == ASKED
    (call,) = called["tool_calls"]
    assert call["function"]["name"] == "weather"
    (response,) = answered["tool_responses"]
    assert response["tool_call_id"] == call["id"] and response["content"].startswith("It is sunny in ")
    assert chat({}, 1)[-1]["role"] == "user"  # an answer of any text


def test_ag2s_structured_output(url: str) -> None:
    config = {"model": NAME, "base_url": url, "api_key": "none", "price": [0, 0], "response_format": City}
    helper = autogen.ConversableAgent("helper", llm_config=autogen.LLMConfig({**config, "max_tokens": 80}))
    user = autogen.ConversableAgent("user", llm_config=False, human_input_mode="NEVER")
    *_, last = user.initiate_chat(helper, message=BUSY, max_turns=1, silent=True).chat_history
    City.model_validate_json(last["content"])


# --- AutoGen ----------------------------------------------------------------------------------------------------------


def autogens(url: str, **more: Any) -> OpenAIChatCompletionClient:
    return OpenAIChatCompletionClient(
        model=NAME,
        base_url=url,
        api_key="none",
        temperature=0,
        max_tokens=60,
        timeout=600,
        model_info={
            "vision": False,
            "function_calling": True,
            "json_output": True,
            "structured_output": True,
            "family": ModelFamily.UNKNOWN,
        },
        **more,
    )


def test_autogens_client(url: str) -> None:
    async def ask() -> None:
        client = autogens(url)
        tool = FunctionTool(weather, description="The weather of a city.")
        message = UserMessage(content=ASKED, source="user")
        whole = await client.create([message], tools=[tool], tool_choice="required")
        assert whole.finish_reason == "function_calls"
        (call,) = whole.content
        *_, streamed = [part async for part in client.create_stream([message], tools=[tool], tool_choice="required")]
        assert not isinstance(call, str) and not isinstance(streamed, str) and not isinstance(streamed.content, str)
        assert [(c.name, c.arguments) for c in streamed.content] == [(call.name, call.arguments)]
        parsed = await client.create([message], json_output=City)
        assert isinstance(parsed.content, str) and City.model_validate_json(parsed.content)
        await client.close()

    asyncio.run(ask())


@pytest.mark.parametrize("stream", [False, True])
def test_autogens_agents(url: str, stream: bool) -> None:
    async def ask() -> None:
        client = autogens(url, extra_body=REQUIRED)
        agent = AssistantAgent("helper", client, tools=[weather], model_client_stream=stream)
        kinds = [type(message).__name__ for message in (await agent.run(task=ASKED)).messages]
        assert [kind for kind in kinds if "Chunk" not in kind] == [
            "TextMessage",
            "ToolCallRequestEvent",
            "ToolCallExecutionEvent",
            "ToolCallSummaryMessage",
        ]
        await client.close()
        client = autogens(url)
        typed = AssistantAgent("helper", client, output_content_type=City)
        found: Any = await typed.run(task=ASKED)
        assert isinstance(found.messages[-1].content, City)
        free = AssistantAgent("helper", client, tools=[weather], reflect_on_tool_use=True, model_client_stream=stream)
        found = await free.run(task=ASKED)
        assert found.messages[-1].source == "helper"
        await client.close()

    asyncio.run(ask())


# --- Haystack ---------------------------------------------------------------------------------------------------------


def haystacks(url: str, **more: Any) -> OpenAIChatGenerator:
    return OpenAIChatGenerator(
        model=NAME,
        api_base_url=url,
        api_key=Secret.from_token("none"),
        timeout=600,
        generation_kwargs={"temperature": 0, "max_tokens": 60, **more},
    )


def test_haystacks_generator(url: str) -> None:
    tool = create_tool_from_function(weather)
    generator = haystacks(url, **REQUIRED)
    (whole,) = generator.run([ChatMessage.from_user(ASKED)], tools=[tool])["replies"]
    (call,) = whole.tool_calls
    assert call.tool_name == "weather" and whole.meta["finish_reason"] == "tool_calls"
    chunks: list[StreamingChunk] = []
    (streamed,) = generator.run([ChatMessage.from_user(ASKED)], tools=[tool], streaming_callback=chunks.append)[
        "replies"
    ]
    assert [(c.tool_name, c.arguments) for c in streamed.tool_calls] == [(call.tool_name, call.arguments)]
    assert len(chunks) > 2
    (typed,) = haystacks(url, response_format=City).run([ChatMessage.from_user(ASKED)])["replies"]
    City.model_validate_json(typed.text)


def test_haystacks_agents(url: str) -> None:
    tool = create_tool_from_function(weather)
    called = Agent(chat_generator=haystacks(url, **REQUIRED), tools=[tool], exit_conditions=["weather"])
    *_, last = called.run(messages=[ChatMessage.from_user(ASKED)])["messages"]
    assert last.tool_call_result is not None and last.tool_call_result.result.startswith("It is sunny in ")
    free = Agent(chat_generator=haystacks(url), tools=[tool], max_agent_steps=3)
    assert free.run(messages=[ChatMessage.from_user(ASKED)])["messages"]
