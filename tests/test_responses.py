"""/v1/responses over sockets with OpenAI's client: texts, calls, events, what is kept and for how long, errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response

from lpa_model.config import Architecture
from server.protocol.responses import messages_of
from server.routes import responses as route
from server.routes.respond import json_parts
from server.routes.response_store import ResponseStore, Stored
from tests.serving import Served, fail_step, serving, slow_steps, until
from tests.test_limits import Threads
from tests.tiny import tiny_config, write_checkpoint

PATH = "/v1/responses"
FIXED: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 8}
PARAMETERS = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
TOOL = {"type": "function", "name": "count", "parameters": PARAMETERS, "strict": True}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With a context that the plain chat template's description of functions fits."""
    config = tiny_config(max_position_embeddings=2048)
    with serving(write_checkpoint(tmp_path_factory.mktemp("long") / "model", config)) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def chat(served: Served, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The same as a chat: the oracle."""
    body = {"messages": messages, "temperature": 0, "max_tokens": 8, **more}
    return served.answer("/v1/chat/completions", **body)


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_it_answers_as_a_chat_does(served: Served, client: openai.OpenAI) -> None:
    user = {"role": "user", "content": "Who is there?"}
    expected = chat(served, [{"role": "system", "content": "Be brief."}, user])
    answer = client.responses.create(**FIXED, input="Who is there?", instructions="Be brief.", metadata={"a": "b"})
    assert answer.output_text == text_of(expected)
    assert (answer.status, answer.object, answer.model, answer.error) == ("incomplete", "response", "tiny", None)
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    assert (answer.instructions, answer.metadata, answer.temperature) == ("Be brief.", {"a": "b"}, 0)
    assert answer.usage is not None
    assert answer.usage.input_tokens == expected["usage"]["prompt_tokens"]
    assert answer.usage.output_tokens == 8 and answer.usage.total_tokens == answer.usage.input_tokens + 8
    parts = [{"type": "input_text", "text": "Who is"}, {"type": "input_text", "text": "there?"}]
    for content in ("Who is\nthere?", parts):
        items: Any = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        items.append({"type": "message", "role": "user", "content": content})
        messages = [*items[:2], {"role": "user", "content": "Who is\nthere?"}]
        assert client.responses.create(**FIXED, input=items).output_text == text_of(chat(served, messages))


def test_a_text_that_ends_is_completed(client: openai.OpenAI) -> None:
    """A schema that allows one text; the client's own helper parses it."""
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    answer = client.responses.create(**{**FIXED, "max_output_tokens": 40}, input="x", text=form)
    assert json.loads(answer.output_text) == {"a": 1}
    assert (answer.status, answer.incomplete_details) == ("completed", None)
    assert answer.text is not None and answer.text.format is not None
    assert answer.text.format.model_dump(by_alias=True, exclude_none=True) == form["format"]
    loose = client.responses.create(**{**FIXED, "max_output_tokens": 60}, input="x", text={"format": {"type": "text"}})
    assert loose.status == "incomplete"


def events_of(served: Served, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, whose names are their types and whose numbers ascend."""
    answer = served.post(PATH, stream=True, **{**FIXED, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for number, block in enumerate(answer.text.removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        found.append(event)
    return found


def check_stream(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The last event's response, which must be what the others add up to."""
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    items: list[dict[str, Any]] = []
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
            continue
        assert event["output_index"] == len(items) - 1
        item = items[-1]
        if kind == "output_item.done":
            assert event["item"].pop("status") in ("completed", "incomplete")
            item.pop("status")
            assert event["item"] == item
            continue
        assert event["item_id"] == item["id"]
        if kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind == "output_text.delta":
            item["content"][0]["text"] += event["delta"]
            item["content"][0]["logprobs"] += event["logprobs"]
        elif kind == "output_text.done":
            assert (event["text"], event["logprobs"]) == (item["content"][0]["text"], item["content"][0]["logprobs"])
        elif kind == "content_part.done":
            assert event["part"] == item["content"][0]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        else:
            assert kind == "function_call_arguments.done"
            assert (event["arguments"], event["name"]) == (item["arguments"], item["name"])
    last: dict[str, Any] = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}"
    assert items == [{k: v for k, v in item.items() if k != "status"} for item in last["output"]]
    return last


def test_events_add_up_to_the_answer(served: Served, client: openai.OpenAI) -> None:
    streamed = check_stream(events_of(served, input="Who is there?"))
    whole = client.responses.create(**FIXED, input="Who is there?")
    assert Response.model_validate(streamed).output_text == whole.output_text
    assert streamed["usage"] == (whole.usage.to_dict() if whole.usage else None)
    more: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    with_logprobs = check_stream(events_of(served, input="Who is there?", **more))
    expected = chat(served, [{"role": "user", "content": "Who is there?"}], logprobs=True, top_logprobs=2)
    assert with_logprobs["output"][0]["content"][0]["logprobs"] == expected["choices"][0]["logprobs"]["content"]
    with client.responses.stream(**{**FIXED, "max_output_tokens": 60}, input="x", text={"format": ONE}) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == '{"a": 1}' or kinds[-1] == "response.completed"


ONE: Any = {
    "type": "json_schema",
    "name": "x",
    "schema": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False},
    "strict": True,
}


def test_calls_are_items_and_their_outputs_are_answered(served: Served, client: openai.OpenAI) -> None:
    body: dict[str, Any] = {**FIXED, "max_output_tokens": 60, "tools": [TOOL], "parallel_tool_calls": False}
    named = {"type": "function", "name": "count"}
    for choice in ("required", named, {"type": "allowed_tools", "mode": "required", "tools": [named]}):
        answer = client.responses.create(**body, input="Count.", tool_choice=choice)
        (call,) = answer.output
        assert call.type == "function_call" and call.name == "count" and json.loads(call.arguments)["n"] in (1, 2)
        assert answer.status == "completed" and call.status == "completed"
        streamed = check_stream(events_of(served, **{**body, "input": "Count.", "tool_choice": choice}))
        assert [item["arguments"] for item in streamed["output"]] == [call.arguments]
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    asked: dict[str, Any] = {"tools": [TOOL], "tool_choice": "none"}
    stored = client.responses.create(**FIXED, **asked, input=[output], previous_response_id=answer.id)
    again: Any = [{"role": "user", "content": "Count."}, call.model_dump(exclude_none=True), output]
    assert client.responses.create(**FIXED, **asked, input=again).output_text == stored.output_text
    again[1] = {"type": "item_reference", "id": call.id}
    assert client.responses.create(**FIXED, **asked, input=again).output_text == stored.output_text
    auto = check_stream(events_of(served, **{**body, "input": "Count."}))
    assert {item["type"] for item in auto["output"]} <= {"message", "function_call"}


def test_a_conversation_goes_on_from_a_stored_response(served: Served, client: openai.OpenAI) -> None:
    first = client.responses.create(**FIXED, input="One.", instructions="Be brief.")
    second = client.responses.create(**FIXED, input="Two.", previous_response_id=first.id)
    third = client.responses.create(**FIXED, input="Three.", previous_response_id=second.id, store=False)
    said = [{"role": "user", "content": "One."}, {"role": "assistant", "content": first.output_text}]
    said += [{"role": "user", "content": "Two."}, {"role": "assistant", "content": second.output_text}]
    assert second.output_text == text_of(chat(served, said[:3]))  # the first one's instructions do not stay
    assert third.output_text == text_of(chat(served, [*said, {"role": "user", "content": "Three."}]))
    assert client.responses.retrieve(second.id) == second
    assert second.previous_response_id == first.id
    (item,) = client.responses.input_items.list(second.id).data
    assert item.to_dict()["content"] == [{"type": "input_text", "text": "Two."}]
    client.responses.delete(first.id)
    for gone in (first.id, third.id, "resp_x"):
        with pytest.raises(openai.NotFoundError, match="is stored"):
            client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError):
            client.responses.input_items.list(gone)
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**FIXED, input="x", previous_response_id=gone)
        assert refused.value.code == "previous_response_not_found" and refused.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(first.id)
    assert client.responses.create(**FIXED, input="Three.", previous_response_id=second.id).output_text == (
        third.output_text
    )


def test_input_items_come_in_pages(client: openai.OpenAI) -> None:
    texts = [f"number {i}" for i in range(7)]
    items: Any = [{"role": "user", "content": text, "id": f"mine_{i}"} for i, text in enumerate(texts)]
    answer = client.responses.create(**FIXED, input=items)
    page = client.responses.input_items.list(answer.id, limit=3, order="asc")
    assert page.has_more and [item.id for item in page.data] == ["mine_0", "mine_1", "mine_2"]
    assert [item.id for item in page] == [f"mine_{i}" for i in range(7)]  # the client turns the pages
    assert [item.id for item in client.responses.input_items.list(answer.id)] == [f"mine_{i}" for i in range(7)][::-1]
    with pytest.raises(openai.BadRequestError, match="after"):
        client.responses.input_items.list(answer.id, after="mine_9")


def test_one_that_runs_is_found_and_cancelled(
    served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(served, monkeypatch, 0.05)
    body: dict[str, Any] = {**FIXED, "max_output_tokens": 100, "stream": True}
    stream = client.responses.create(**body, input="x")
    first = next(iter(stream))
    response_id = first.response.id
    assert client.responses.retrieve(response_id).status == "in_progress"
    assert client.responses.cancel(response_id).status == "cancelled"
    last = list(stream)[-1]
    assert last.type == "response.failed" and last.response.status == "cancelled"
    assert client.responses.retrieve(response_id).status == "cancelled"
    again = client.responses.cancel(response_id)  # as OpenAI's, which answers with the response as it ended
    assert again == client.responses.retrieve(response_id)
    whole_answer = client.responses.create(**FIXED, input="x")
    with pytest.raises(openai.BadRequestError, match="the response is incomplete; only one that is in progress"):
        client.responses.cancel(whole_answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_x")
    until(served.idle)
    codes: list[int] = []

    def whole() -> None:
        codes.append(served.post(PATH, **{**FIXED, "max_output_tokens": 100}, input="x").status_code)

    thread = threading.Thread(target=whole)
    thread.start()
    until(lambda: served.engine.has_work)
    with client.responses.create(**body, input="y") as other:
        next(iter(other))
    thread.join(30)
    assert codes == [200]
    until(served.idle)  # the client that left ended its response


def test_one_that_runs_is_shown_as_it_is_when_it_is_looked_up(
    served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long writing it takes: here until it has ended."""
    slow_steps(served, monkeypatch, 0.05)
    looked_up, ended = threading.Event(), threading.Event()

    def held(value: Any, levels: int) -> Iterator[str]:
        if "type" not in value and "status" in value and not ended.is_set():  # no event, nor what is stored
            looked_up.set()
            assert ended.wait(600)
        return json_parts(value, levels)

    monkeypatch.setattr(route, "json_parts", held)
    stream = iter(client.responses.create(**{**FIXED, "max_output_tokens": 20}, stream=True, input="x"))
    response_id = next(stream).response.id
    assert any(event.type == "response.output_text.delta" for event in stream)
    found: list[Response] = []
    thread = threading.Thread(target=lambda: found.append(client.responses.retrieve(response_id)))
    thread.start()
    assert looked_up.wait(600)
    last = list(stream)[-1]
    ended.set()
    thread.join(600)
    assert last.type == "response.incomplete" and last.response.id == response_id
    (response,) = found
    assert (response.status, response.usage, response.incomplete_details) == ("in_progress", None, None)
    (item,) = response.output
    assert item.type == "message" and (item.status, item.content) == ("in_progress", [])


def test_a_failure_in_the_middle_is_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_step(served, monkeypatch, 1)
    assert served.post(PATH, stream=True, **FIXED, input="x").status_code == 500
    fail_step(served, monkeypatch, 4)
    last = check_stream(events_of(served, input="x"))
    assert last["status"] == "failed" and last["error"]["code"] == "engine_error"
    assert last["output"][0]["status"] == "incomplete"


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "is required"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search' is not run by this server"),
    ({"tools": [TOOL, {"type": "file_search", "vector_store_ids": []}]}, "tools[1].type", "'file_search'"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name", "is given twice"),
    ({"tools": [{**TOOL, "parameters": {"type": "no"}}]}, "tools[0].parameters", ""),
    ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name", "pattern"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name", "not among the tools"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "functions alone"),
    ({"reasoning": {"effort": "low"}}, "reasoning", "not supported"),
    ({"background": True}, "background", "not supported"),
    ({"conversation": "conv_1"}, "conversation", "not supported"),
    ({"truncation": "auto"}, "truncation", "not supported"),
    ({"max_tool_calls": 3}, "max_tool_calls", "not supported"),
    ({"include": ["file_search_call.results"]}, "include[0]", "output_text.logprobs"),
    ({"top_logprobs": 2}, "top_logprobs", "in include"),
    ({"stream_options": {}}, "stream_options", "needs stream"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "needs it"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "no"}}}}, "text.format.schema", ""),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
    ({"input": [{"role": "user"}]}, "input[0].content", "is required"),
    ({"input": [{"role": "king", "content": "x"}]}, "input[0].role", "'user'"),
    ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input[0].colour", "unknown"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "'input_image'"),
    ({"input": [{"type": "reasoning", "id": "x"}]}, "input[0].type", "'reasoning'"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id", "no item of a stored response"),
    (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
        "input[0].arguments",
        "is not JSON",
    ),
    ({"input": [5]}, "input[0]", "must be an object"),
    ({"input": "the sea " * 3000}, "input", "maximum context length is 2048 tokens"),
    ({"max_output_tokens": 5000}, "max_output_tokens", "input: "),
    ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16"),
]


@pytest.mark.parametrize(("body", "param", "message"), REFUSED)
def test_what_is_refused(served: Served, body: dict[str, Any], param: str, message: str) -> None:
    answer = served.post(PATH, **{**FIXED, "input": "x", **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"], error


def stored(size: int, name: str = "x") -> Stored:
    return Stored({"id": name, "output": [{"id": f"item of {name}"}]}, [], 0, size)


def test_the_memory_has_limits(tiny_checkpoints: dict[Architecture, Path]) -> None:
    with serving(tiny_checkpoints["setting2"], max_stored_responses=2, max_stored_bytes=6000) as served:
        ids = [served.post(PATH, **FIXED, input="x").json()["id"] for _ in range(2)]
        assert served.client.get(f"{PATH}/{ids[0]}").status_code == 200  # used, so that the other goes
        ids.append(served.post(PATH, **FIXED, input="x").json()["id"])
        assert [served.client.get(f"{PATH}/{i}").status_code for i in ids] == [200, 404, 200]
        large = served.post(PATH, **FIXED, input="x", metadata={"a": "b" * 6000}).json()
        assert large["store"] is False
        assert served.client.get(f"{PATH}/{large['id']}").status_code == 404
        streamed = events_of(served, input="x", metadata={"a": "b" * 6000})
        assert streamed[-1]["response"]["store"] is False
    with serving(tiny_checkpoints["setting2"], max_stored_responses=0) as served:
        assert served.post(PATH, **FIXED, input="x").json()["store"] is False


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "remove"]), st.integers(0, 9), st.integers(1, 40))))
def test_a_store_keeps_what_was_used_last(actions: list[tuple[str, int, int]]) -> None:
    """Against a list, the one unused for longest first."""
    store, kept = ResponseStore(4, 60), list[tuple[str, int]]()
    for number, (action, place, size) in enumerate(actions):
        name = kept[place % len(kept)][0] if kept else "none"
        if action == "put":
            store.put(str(number), stored(size, str(number)))
            kept.append((str(number), size))
            while len(kept) > 4 or sum(size for _, size in kept) > 60:
                kept.pop(0)
        elif action == "get":
            assert (store.get(name) is not None) is bool(kept)
            kept.sort(key=lambda entry: entry[0] == name)
        else:
            assert store.remove(name) is bool(kept)
            kept = [entry for entry in kept if entry[0] != name]
        assert len(store) == len(kept) and store.num_bytes == sum(size for _, size in kept)
        for i in range(number + 1):
            assert (store.item(f"item of {i}") is not None) is any(entry[0] == str(i) for entry in kept)
    assert not store.fits(61) and store.fits(60)


def test_calls_side_by_side_are_one_message() -> None:
    def call(name: str, arguments: str = "{}", status: str = "completed") -> dict[str, Any]:
        fields = {"call_id": f"id of {name}", "name": name, "arguments": arguments, "status": status}
        return {"type": "function_call", **fields}

    items = [
        {"type": "message", "role": "user", "content": [{"text": "a"}]},
        {"type": "message", "role": "assistant", "content": [{"text": "b"}]},
        call("f"),
        call("g", '{"x": 1}'),
        {"type": "function_call_output", "call_id": "id of f", "output": "c"},
        call("h", '{"cut', "incomplete"),
        call("i", '{"x": 2}', "incomplete"),
    ]
    found = [message.to_template() for message in messages_of("z", items)]
    assert [(m["role"], m["content"], m["tool_call_id"]) for m in found] == [
        ("system", "z", None),
        ("user", "a", None),
        ("assistant", "b", None),
        ("tool", "c", "id of f"),
        ("assistant", "", None),
    ]
    calls = [[(c["id"], c["function"]) for c in m["tool_calls"] or []] for m in found]
    assert calls[2] == [
        ("id of f", {"name": "f", "arguments": {}}),
        ("id of g", {"name": "g", "arguments": {"x": 1}}),
    ]
    assert calls[4] == [("id of i", {"name": "i", "arguments": {"x": 2}})]


def test_what_grows_with_a_request_is_done_beside_the_event_loop(
    served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = Threads(monkeypatch)
    for name in ("item_of", "json_parts"):
        threads.watch(route, name)
    long = client.responses.create(**FIXED, input="x", metadata={"a": "b" * 500})
    client.responses.retrieve(long.id)
    assert set(threads.found) == {"item_of", "json_parts"}
    loop = served.loop_thread()
    assert all(loop not in found for found in threads.found.values())
