"""/v1/responses: request fields, and the conversation that they mean."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, ValidationError, model_validator

from server.errors import InvalidRequest, UserError
from server.protocol.body import HARMLESS, REFUSED, RequestBody, ignore_unknown_fields, refusal
from server.protocol.chat import PARTS_JOINED_BY, ChatCompletionRequest, FunctionCall, Message
from server.protocol.inputs import MODEL
from server.protocol.sampling import INT64, MAX_LOGPROBS
from server.protocol.structured import JsonSchemaFormat
from server.protocol.tools import FunctionTool

LOGPROBS = "message.output_text.logprobs"
PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # type -> field of its text
PART_FIELDS = frozenset({"type", "text", "refusal", "annotations", "logprobs", "prompt_cache_breakpoint"})
MAX_METADATA = 16

Item = dict[str, Any]
"""An item of a conversation as it is stored and shown."""


class Part(BaseModel):
    """A piece of a message; it documents what `_join_parts` reads and is never built."""

    type: Literal["input_text", "output_text", "refusal"] = Field(description="Only text is understood.")
    text: str = Field(description="The piece.", examples=["Tell me a story."])


def _join_parts(value: Any) -> Any:
    """A message's content, or a function's output, as one text; as it is if it is no list of parts."""
    if not isinstance(value, list):
        return value
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict):
            raise refusal("must be an object with type and text", i)
        if (name := PARTS.get(str(part.get("type")))) is None:
            raise refusal(f"must be 'input_text' or 'output_text', not {str(part.get('type'))[:40]!r}", i, "type")
        if not isinstance(part.get(name), str):
            raise refusal("must be a text", i, name)
        if (unknown := part.keys() - PART_FIELDS) and not ignore_unknown_fields.get():
            raise refusal("is unknown to this server", i, min(unknown)[:64], code="unknown_parameter")
        texts.append(part[name])
    return PARTS_JOINED_BY.join(texts)


def _validated(kind: type[RequestBody], value: dict[str, Any]) -> RequestBody:
    """An instance of `kind`; pydantic itself would lose the places of the errors."""
    try:
        return kind.model_validate(value)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_input=False)[0]
        told = first.get("ctx", {}) if first["type"] == REFUSED else {}
        reason = "is required" if first["type"] == "missing" else first["msg"][:1].lower() + first["msg"][1:]
        raise refusal(reason, *first["loc"], *told.get("loc", ()), code=told.get("code")) from None


Content = Annotated[str, BeforeValidator(_join_parts, json_schema_input_type=str | list[Part])]


class InputMessage(RequestBody):
    """A message."""

    harmless: ClassVar[frozenset[str]] = frozenset({"status", "phase"})

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content = Field(description="A text, or parts of one.", examples=["Tell me a story."])
    id: str | None = Field(None, description="Of a message that was answered.")


class InputCall(FunctionCall):
    """A call that an answer made."""

    harmless: ClassVar[frozenset[str]] = frozenset({"status", "caller"})

    type: Literal["function_call"] = "function_call"
    call_id: str
    id: str | None = None


class InputCallOutput(RequestBody):
    """What a call came to."""

    harmless: ClassVar[frozenset[str]] = frozenset({"status", "name", "caller"})

    type: Literal["function_call_output"] = "function_call_output"
    call_id: str = Field(description="Of the call.")
    output: Content = Field(description="A text, or parts of one.")
    id: str | None = None


class ItemReference(RequestBody):
    """An item of a stored response."""

    type: Literal["item_reference"] = "item_reference"
    id: str


InputItem = InputMessage | InputCall | InputCallOutput | ItemReference
KINDS: dict[str, type[RequestBody]] = {
    "message": InputMessage,
    "function_call": InputCall,
    "function_call_output": InputCallOutput,
    "item_reference": ItemReference,
}


def _kind(value: Any) -> Any:
    """An item's own type, so that errors name its fields and no union's."""
    if not isinstance(value, dict):
        raise refusal("must be an object")
    kind = value.get("type", "message" if "role" in value else "item_reference" if "id" in value else None)
    if kind not in KINDS:
        named = ", ".join(map(repr, KINDS))
        raise refusal(f"{str(kind)[:40]!r} is not supported by this server; it reads {named}", "type")
    return _validated(KINDS[kind], value)


def _items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


AnyItem = Annotated[Any, BeforeValidator(_kind, json_schema_input_type=InputItem)]


class ResponseTool(FunctionTool):
    """A function that may be called."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "defer_loading": (False,),
        "allowed_callers": (["direct"],),
        "output_schema": (),
    }

    type: Literal["function"] = Field("function", description="Only functions are called.")


def _tool(value: Any) -> Any:
    if isinstance(value, dict) and (kind := value.get("type")) != "function":
        raise refusal(f"{str(kind)[:40]!r} is not run by this server; functions alone are called", "type")
    return value


class ChosenFunction(RequestBody):
    """A function by its name."""

    type: Literal["function"] = "function"
    name: str


class ChosenTools(RequestBody):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenFunction] = Field(min_length=1, max_length=128)


Word = Literal["none", "auto", "required"]


def _choice(value: Any) -> Any:
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise refusal("must be 'none', 'auto', 'required' or an object that names a function")
        return value
    if not isinstance(value, dict) or value.get("type") not in ("function", "allowed_tools"):
        raise refusal("must be 'function' or 'allowed_tools'; functions alone are called", "type")
    return _validated(ChosenFunction if value["type"] == "function" else ChosenTools, value)


Choice = Annotated[Any, PlainValidator(_choice, json_schema_input_type=Word | ChosenFunction | ChosenTools)]


class TextFormat(JsonSchemaFormat):
    """The text's form."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        "text", description="text: free. json_object: any JSON object. json_schema: JSON that follows `schema`."
    )
    name: str = Field("", max_length=64, description="With json_schema: its name; not used.", examples=["answer"])

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refusal("goes with type 'json_schema', which needs it", "schema")
        return self

    def response_format(self) -> dict[str, Any]:
        """As a chat has it."""
        if self.type != "json_schema":
            return {"type": self.type}
        schema = {"name": self.name or "answer", "schema": self.json_schema, "strict": self.strict}
        return {"type": "json_schema", "json_schema": schema}


class TextConfig(RequestBody):
    """How the text is written."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat = Field(TextFormat.model_validate({}), description="The text's form (default: free text).")


class ResponseStreamOptions(RequestBody):
    """What a stream carries beside the text."""

    include_obfuscation: bool = Field(False, description="Taken and not used: nothing is padded.")


class ResponsesRequest(RequestBody):
    """The next answer of a conversation."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "context_management": (),
        "conversation": (),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "reasoning": ({}, {"effort": "none"}),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
    }
    harmless: ClassVar[frozenset[str]] = HARMLESS - {"metadata"}

    model: str | None = MODEL
    input: Annotated[list[AnyItem], BeforeValidator(_items, json_schema_input_type=str | list[InputItem])] = Field(
        [],
        fail_fast=True,
        description="What is new in the conversation: a text of the user, or items.",
        examples=["Tell me a story."],
    )
    instructions: str | None = Field(
        None, description="A system message before everything; one of a previous response does not stay."
    )
    previous_response_id: str | None = Field(
        None, description="The conversation so far: a stored response, with all that was before it."
    )
    store: bool = Field(
        True, description="Keep the response for `previous_response_id`, in memory, as far as the server's limits go."
    )
    max_output_tokens: int | None = Field(
        None, ge=1, description="Most tokens to generate (default: as many as fit the context)."
    )
    temperature: float = Field(1.0, ge=0, le=2, description="0 always takes the most probable token.")
    top_p: float = Field(1.0, ge=0, le=1, description="Draw from the most probable tokens that sum to this.")
    text: TextConfig = Field(TextConfig.model_validate({}), description="The text's form.")
    tools: list[Annotated[ResponseTool, BeforeValidator(_tool)]] = Field(
        [], fail_fast=True, description="Functions that may be called; other tools are refused by name."
    )
    tool_choice: Choice = Field(
        "auto",
        description="auto: text or calls, as the model chooses. required: calls. none: text. An object: a call of that "
        "function, or a choice among some.",
    )
    parallel_tool_calls: bool = Field(True, description="Several calls in an answer, where the template can.")
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(
        [],
        description=f"{LOGPROBS}: log-probabilities of the text's tokens. The other one asks for nothing here.",
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description=f"Alternatives for each token; needs {LOGPROBS} in `include`."
    )
    stream: bool = Field(False, description="Send events while the answer is generated.")
    stream_options: ResponseStreamOptions | None = Field(None, description="Only with `stream`.")
    metadata: dict[str, str] = Field({}, max_length=MAX_METADATA, description="Is shown in the response.")
    seed: int | None = Field(None, ge=-INT64, lt=INT64, description="Makes the choice of tokens repeatable.")
    top_k: int = Field(0, ge=-1, description="Draw from this many most probable tokens; 0 or -1: from all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Draw only tokens at least this probable, as in chats.")
    priority: int = Field(0, ge=-INT64, lt=INT64, description="Requests with a smaller number go first.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=1024, description="Share cached prompts only with requests of the same salt."
    )
    chat_template_kwargs: dict[str, Any] = Field({}, description="More variables for the chat template.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.top_logprobs is not None and LOGPROBS not in self.include:
            raise InvalidRequest(f"top_logprobs: needs {LOGPROBS!r} in include", param="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options: needs stream to be true", param="stream_options")
        if not self.input and self.previous_response_id is None:
            raise InvalidRequest("input: is required", param="input")
        return self

    def chat(self, items: Sequence[Item]) -> ChatCompletionRequest:
        """The same as a chat about the items of a conversation.

        Raises:
            InvalidRequest: as a chat; `renamed` gives the fields their names here.
        """
        passed = ("temperature", "top_p", "top_k", "min_p", "seed", "cache_salt", "priority")
        fields = {name: getattr(self, name) for name in passed if name in self.model_fields_set}
        fields |= {
            "messages": messages_of(self.instructions, items),
            "max_completion_tokens": self.max_output_tokens,
            "response_format": self.text.format.response_format(),
            "logprobs": LOGPROBS in self.include,
            "top_logprobs": self.top_logprobs,
            "tools": [{"type": "function", "function": _function(tool)} for tool in self.tools],
            "tool_choice": _chat_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return ChatCompletionRequest.model_validate(fields)


def _function(tool: ResponseTool) -> dict[str, Any]:
    return tool.model_dump(exclude={"type"}, exclude_none=True)


def _chat_choice(choice: Any) -> Any:
    if isinstance(choice, ChosenFunction):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, ChosenTools):
        named = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": named}}
    return choice


def message_item(item_id: str, role: str, text: str, status: str, logprobs: Sequence[Any] = ()) -> Item:
    """A message as it is shown."""
    part: dict[str, Any] = {"type": "output_text" if role == "assistant" else "input_text", "text": text}
    if role == "assistant":
        part |= {"annotations": [], "logprobs": list(logprobs)}
    return {"id": item_id, "type": "message", "status": status, "role": role, "content": [part]}


def call_item(item_id: str, call_id: str, name: str, arguments: str, status: str) -> Item:
    """A call as it is shown."""
    fields = {"call_id": call_id, "name": name, "arguments": arguments}
    return {"id": item_id, "type": "function_call", "status": status, **fields}


def item_of(item: InputMessage | InputCall | InputCallOutput, item_id: str) -> Item:
    """An item of a request as it is stored; `item_id` is for one without an id."""
    item_id = item.id or item_id
    if isinstance(item, InputMessage):
        return message_item(item_id, item.role, item.content, "completed")
    if isinstance(item, InputCall):
        arguments = json.dumps(item.arguments, ensure_ascii=False)
        return call_item(item_id, item.call_id, item.name, arguments, "completed")
    fields = {"call_id": item.call_id, "output": item.output}
    return {"id": item_id, "type": "function_call_output", "status": "completed", **fields}


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[Message]:
    """A conversation's messages; calls that stand side by side, or behind a text, are of one message. A call that was
    cut off is none."""
    found: list[dict[str, Any]] = []
    if instructions is not None:
        found.append({"role": "system", "content": instructions})
    for item in items:
        if item["type"] == "message":
            found.append({"role": item["role"], "content": item["content"][0]["text"]})
        elif item["type"] == "function_call":
            if item["status"] == "incomplete" and not _is_object(item["arguments"]):
                continue
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": None})
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            found[-1].setdefault("tool_calls", []).append(call)
        else:
            found.append({"role": "tool", "content": item["output"], "tool_call_id": item["call_id"]})
    return [Message.model_validate(message) for message in found]


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


NAMES = (
    (re.compile(r"^messages.*$"), "input"),
    (re.compile(r"^max_completion_tokens$"), "max_output_tokens"),
    (re.compile(r"^response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"^tools\[(\d+)\]\.function"), r"tools[\1]"),
    (re.compile(r"^tool_choice\.(function|allowed_tools)"), "tool_choice"),
    (re.compile(r"^(tool_choice\.tools\[\d+\])\.function"), r"\1"),
)


def renamed(error: UserError) -> UserError:
    """An error of a chat about a field of a response."""
    if error.param is not None:
        param = error.param
        for pattern, ours in NAMES:
            param = pattern.sub(ours, param)
        if error.message.startswith(error.param):
            error.message = param + error.message.removeprefix(error.param)
        elif error.message.startswith("messages: "):
            error.message = "input" + error.message.removeprefix("messages")
        error.message = error.message.replace("max_completion_tokens", "max_output_tokens")
        error.param = param
    return error
