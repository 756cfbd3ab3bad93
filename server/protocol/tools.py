"""Functions that a model may call, and whether it must: `tools`, `tool_choice`, and the calls of an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from server.engine.tool_grammar import Function, ToolChoice
from server.engine.tool_reader import Call, CallDelta
from server.errors import InvalidRequest
from server.protocol.body import RequestBody, refusal

MAX_TOOLS = 128  # as OpenAI's
MAX_TOOL_BYTES = 1 << 18  # of all of them, as JSON
NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class FunctionTool(RequestBody):
    """What can be called."""

    name: str = Field(pattern=NAME, description="Its name.", examples=["weather"])
    description: str | None = Field(None, description="What it does, for the model.")
    parameters: dict[str, Any] | None = Field(
        None,
        description="JSON schema of its arguments, of type object (default: it has none).",
        examples=[{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}],
    )
    strict: bool | None = Field(
        None, description="Every property is required, and no other may come; the schema is followed either way."
    )


class Tool(RequestBody):
    """A function."""

    harmless: ClassVar[frozenset[str]] = frozenset({"cache_control"})

    type: Literal["function"] = Field(description="Only functions are called.")
    function: FunctionTool

    def to_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class NamedFunction(RequestBody):
    """A function by its name."""

    name: str


class NamedTool(RequestBody):
    """A function by its name."""

    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedTools(RequestBody):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)


class Choosing(RequestBody):
    """Any of the forms of tool_choice; a word is its type."""

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    function: NamedFunction | None = Field(None, description="With type function.")
    allowed_tools: AllowedTools | None = Field(None, description="With type allowed_tools.")


class ToolChoiceObject(Choosing):
    """One function, which is called; or some of them, of which the model chooses."""

    type: Literal["function", "allowed_tools"]


def _choice(value: Any) -> Any:
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return {"type": value}
    if not isinstance(value, dict):
        raise refusal("must be 'none', 'auto', 'required' or an object that names a function")
    if value.get("type") not in ("function", "allowed_tools"):
        raise refusal("must be 'function' or 'allowed_tools'", "type")
    if value.get(value["type"]) is None:
        raise refusal(f"is required with type {value['type']!r}", value["type"])
    return value


ChoosingField = Annotated[
    Choosing,
    BeforeValidator(_choice, json_schema_input_type=Literal["none", "auto", "required"] | ToolChoiceObject),
]


def check_size(tools: Sequence[Tool]) -> None:
    """Raises InvalidRequest for more tools, or more bytes of them, than a request may have, or a name twice."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools: {len(tools)} functions are more than {MAX_TOOLS}", param="tools")
    size = 0
    names: set[str] = set()
    for i, tool in enumerate(tools):
        where = f"tools[{i}].function"
        if tool.function.name in names:
            raise InvalidRequest(f"{where}.name: {tool.function.name!r} is given twice", param=f"{where}.name")
        names.add(tool.function.name)
        size += len(json.dumps(tool.to_template(), ensure_ascii=False).encode(errors="replace"))
        if size > MAX_TOOL_BYTES:
            raise InvalidRequest(
                f"{where}.parameters: with it the tools have more than {MAX_TOOL_BYTES} bytes of JSON",
                param=f"{where}.parameters",
            )


def choice_of(tools: Sequence[Tool], chosen: Choosing | None, parallel: bool) -> ToolChoice | None:
    """What an answer may be; None: text alone.

    Raises:
        InvalidRequest: a function that is chosen is not there.
    """
    functions = tuple(
        Function(tool.function.name, tool.function.parameters, bool(tool.function.strict), f"[{i}].function.parameters")
        for i, tool in enumerate(tools)
    )
    if chosen is None or chosen.type == "auto":
        return ToolChoice("auto", functions, parallel) if functions else None
    if chosen.type == "none":
        return None
    if not functions:
        raise InvalidRequest(f"tool_choice: {chosen.type!r} needs tools", param="tool_choice")
    if chosen.function is not None:
        found = _named(functions, chosen.function.name, "tool_choice.function.name")
        return ToolChoice("named", (found,), parallel)
    if chosen.allowed_tools is None:
        return ToolChoice("required", functions, parallel)
    names = [tool.function.name for tool in chosen.allowed_tools.tools]
    for i, name in enumerate(names):
        _named(functions, name, f"tool_choice.allowed_tools.tools[{i}].function.name")
    some = tuple(function for function in functions if function.name in names)
    return ToolChoice(chosen.allowed_tools.mode, some, parallel)


def _named(functions: Sequence[Function], name: str, where: str) -> Function:
    for function in functions:
        if function.name == name:
            return function
    raise InvalidRequest(f"{where}: {name[:64]!r} is not among the tools", param=where)


def call_entry(call: Call) -> dict[str, Any]:
    """An entry of `tool_calls` of a whole answer."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def delta_entry(delta: CallDelta, calls: Sequence[Call]) -> dict[str, Any]:
    """An entry of `tool_calls` of a stream: with the first one of a call its id and name."""
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": calls[delta.index].id, "type": "function", "function": function}
