"""/v1/responses and /v1/embeddings by others: OpenAI's clients, the Agents SDK and LangChain, unchanged, on SmolLM2."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.extra.node import run_node
from tests.extra.test_smollm2 import folder, source  # noqa: F401  # fixtures
from tests.serving import Served, serving, until

os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"  # traces would go to OpenAI
import agents
import langchain.agents
import langchain_openai

pytestmark = pytest.mark.filterwarnings("default")  # theirs
QUESTION, WEATHER = "What is the capital of France?", "What is the weather in Paris?"


class Place(BaseModel):
    """Where something is."""

    city: str
    country: str


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:  # noqa: F811  # the imported fixture
    with serving(folder, threads=2, kv_cache_memory=256 << 20, max_model_len=4096) as server:
        yield server
        until(server.idle)


def test_openai_for_node(served: Served) -> None:
    run_node("responses.mjs", f"{served.url}/v1", "none")


def test_openai_for_python_parses(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        parsed = client.responses.parse(
            model="tiny", input="Paris is in France.", text_format=Place, temperature=0, max_output_tokens=60
        )
        assert parsed.output_parsed == Place(city="Paris", country="France")
        tool = openai.pydantic_function_tool(Place)["function"]
        called = client.responses.create(
            model="tiny",
            input="Paris is in France.",
            tools=[{"type": "function", **tool}],  # type: ignore[list-item]
            tool_choice={"type": "function", "name": "Place"},
            temperature=0,
            max_output_tokens=60,
        )
    (call,) = called.output
    assert call.type == "function_call"
    assert Place.model_validate_json(call.arguments).city == "Paris"


@pytest.mark.anyio
async def test_agents(served: Served) -> None:
    called: list[str] = []

    @agents.function_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        called.append(city)
        return "sunny"

    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        model = agents.OpenAIResponsesModel("tiny", client)

        def agent(**more: Any) -> Any:
            settings = {"max_tokens": 60, "temperature": 0, **more.pop("settings", {})}
            of_model = agents.ModelSettings(**settings)
            return agents.Agent(name="a", instructions="Be helpful.", model=model, model_settings=of_model, **more)

        first = await agents.Runner.run(agent(), QUESTION)
        assert "Paris" in first.final_output
        second = await agents.Runner.run(agent(), "And of Germany?", previous_response_id=first.last_response_id)
        assert "Berlin" in second.final_output
        whole = await agents.Runner.run(
            agent(), [*first.to_input_list(), {"role": "user", "content": "And of Germany?"}]
        )
        assert whole.final_output == second.final_output
        acting = agent(tools=[weather], settings={"tool_choice": "required", "parallel_tool_calls": False})
        found = await agents.Runner.run(acting, WEATHER)
        assert called == ["Paris"] and found.final_output
        streamed = agents.Runner.run_streamed(acting, WEATHER)
        names = [event.name async for event in streamed.stream_events() if event.type == "run_item_stream_event"]
        assert names == ["tool_called", "tool_output", "message_output_created"]
        assert called == ["Paris"] * 2 and streamed.final_output == found.final_output
        typed = await agents.Runner.run(agent(output_type=Place), "Paris is in France.")
        assert typed.final_output == Place(city="Paris", country="France")


def test_langchain(served: Served) -> None:
    where: dict[str, Any] = {"model": "tiny", "base_url": f"{served.url}/v1", "api_key": "none"}
    chat = langchain_openai.ChatOpenAI(**where, use_responses_api=True, temperature=0, max_tokens=60)
    answer = chat.invoke(QUESTION)
    assert "Paris" in answer.text and answer.usage_metadata is not None
    assert "".join(chunk.text for chunk in chat.stream(QUESTION)) == answer.text
    assert "Berlin" in chat.invoke("And of Germany?", previous_response_id=answer.response_metadata["id"]).text
    for method in ("json_schema", "function_calling"):
        typed = chat.with_structured_output(Place, method=method).invoke("Paris is in France.")
        assert typed == Place(city="Paris", country="France")

    def weather(city: str) -> str:
        """The weather of a city."""
        return f"It is sunny in {city}."

    bound = chat.bind_tools([weather], tool_choice="required", parallel_tool_calls=False)
    (call,) = bound.invoke(WEATHER).tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Paris"})
    done = langchain.agents.create_agent(chat, [weather]).invoke({"messages": [("user", WEATHER)]})
    assert done["messages"][-1].text
    embed = langchain_openai.OpenAIEmbeddings(**where, check_embedding_ctx_length=False)
    vectors = embed.embed_documents(["the sea", "the king"])
    answer_ = served.post("/v1/embeddings", input=["the sea", "the king"]).text
    assert vectors == [entry["embedding"] for entry in json.loads(answer_)["data"]]
