"""Clients that call functions by default, unchanged against SmolLM2, whose template knows no tools: its calls are valid
all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import instructor
import openai
import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool as langchain_tool
from langchain_openai import ChatOpenAI
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import SecretStr
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from smolagents import OpenAIModel, ToolCallingAgent
from smolagents import tool as smolagents_tool

from tests.extra.function_calls import ASKED, BUSY, NAME, City, folder, source, url
from tests.extra.node import run_node

pytestmark = pytest.mark.filterwarnings("default")  # the clients' own
__all__ = ["folder", "source", "url"]  # fixtures


def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: its name
    """
    return f"It is sunny in {city}."


@pytest.fixture(scope="module")
def chat(url: str) -> Iterator[ChatOpenAI]:
    client = ChatOpenAI(
        model=NAME, base_url=url, api_key=SecretStr("none"), temperature=0, max_tokens=80, max_retries=0, timeout=600
    )
    yield client
    client.root_client.close()


def test_langchain_calls_functions(chat: ChatOpenAI) -> None:
    assert isinstance(chat.with_structured_output(City, method="function_calling").invoke(BUSY), City)
    bound = chat.bind_tools([langchain_tool(weather)], tool_choice="required")
    whole = bound.invoke(ASKED)
    assert isinstance(whole, AIMessage)
    (call,) = whole.tool_calls
    chunks = list(bound.stream(ASKED))
    streamed = chunks[0]
    for chunk in chunks[1:]:
        streamed += chunk  # type: ignore[assignment]
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(call["name"], call["args"])]


def test_langchains_agents(chat: ChatOpenAI) -> None:
    agent: Any = create_agent(chat, [langchain_tool(weather)], response_format=City)
    assert isinstance(agent.invoke({"messages": [HumanMessage(BUSY)]})["structured_response"], City)
    free: Any = create_agent(chat, [langchain_tool(weather)])
    assert isinstance(
        free.invoke({"messages": [HumanMessage(ASKED)]}, {"recursion_limit": 12})["messages"][-1], AIMessage
    )


def test_instructor(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as plain:
        client = instructor.from_openai(plain)
        asked: dict[str, Any] = {
            "model": NAME,
            "messages": [{"role": "user", "content": BUSY}],
            "temperature": 0,
            "max_tokens": 80,
        }
        whole = client.chat.completions.create(response_model=City, **asked)
        assert isinstance(whole, City)
        *_, last = client.chat.completions.create_partial(response_model=City, **asked)
        assert (last.name, last.mood) == (whole.name, whole.mood)


def test_pydantic_ai(url: str) -> None:
    model = OpenAIChatModel(NAME, provider=OpenAIProvider(base_url=url, api_key="none"))
    agent = Agent(model, output_type=City, model_settings={"temperature": 0, "max_tokens": 80, "timeout": 600})
    agent.tool_plain(weather)
    assert isinstance(agent.run_sync(BUSY).output, City)


def test_smolagents(url: str) -> None:
    model = OpenAIModel(NAME, api_base=url, api_key="none", temperature=0, max_tokens=60)
    agent = ToolCallingAgent(tools=[smolagents_tool(weather)], model=model, max_steps=1, verbosity_level=0)
    agent.run(ASKED)
    (step,) = [step for step in agent.memory.steps if getattr(step, "tool_calls", None)]
    assert step.error is None
    assert step.tool_calls[0].name in ("weather", "final_answer")


def test_llama_index(url: str) -> None:
    model = OpenAILike(
        model=NAME,
        api_base=url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        temperature=0,
        max_tokens=80,
        context_window=2000,
        timeout=600,
    )
    called = model.predict_and_call([FunctionTool.from_defaults(weather)], user_msg=ASKED, tool_required=True)
    assert str(called).startswith("It is sunny in ")
    assert isinstance(model.as_structured_llm(City).complete(BUSY).raw, City)


def test_vercels_ai_sdk(url: str) -> None:
    run_node("tools.mjs", url, NAME, timeout=1200)
