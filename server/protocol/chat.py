"""POST /v1/chat/completions: request fields, and the answer, built as plain dicts for speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from server.engine.tool_grammar import MAX_CALLS, ToolChoice
from server.engine.tool_reader import Call
from server.errors import InvalidRequest
from server.protocol.body import RequestBody, ignore_unknown_fields, refusal
from server.protocol.json_size import has_more_values
from server.protocol.sampling import FINGERPRINT, MAX_LOGPROBS, SamplingBody, Usage
from server.protocol.tools import (
    MAX_TOOL_BYTES,
    MAX_TOOLS,
    ChoosingField,
    Tool,
    call_entry,
    check_size,
    choice_of,
)

MAX_ARGUMENT_VALUES = 1 << 16  # as of a body; they are JSON in a text, where a body's values are not counted
PARTS_JOINED_BY = "\n"  # as vLLM does


PART_FIELDS = frozenset({"type", "text", "cache_control"})  # the last one is taken and not used


class TextPart(BaseModel):
    """A piece of a message; it documents what `_join_parts` reads and is never built."""

    type: Literal["text"] = Field(description="Only text is understood.")
    text: str = Field(description="The piece.", examples=["Tell me a story."])


def _join_parts(value: Any) -> Any:
    """A message's content as one text, or as it is if it is no list of parts."""
    if not isinstance(value, list):
        return value
    for i, part in enumerate(value):
        if not isinstance(part, dict):
            raise refusal("must be an object with type and text", i)
        if part.get("type") != "text":
            raise refusal(
                f"must be 'text', which alone this server reads, not {str(part.get('type'))[:40]!r}", i, "type"
            )
        if not isinstance(part.get("text"), str):
            raise refusal("must be a text", i, "text")
        if (unknown := part.keys() - PART_FIELDS) and not ignore_unknown_fields.get():
            raise refusal("is unknown to this server", i, min(unknown)[:64], code="unknown_parameter")
    return PARTS_JOINED_BY.join(part["text"] for part in value)


class FunctionCall(RequestBody):
    """What was called."""

    name: str = Field(description="The function.")
    arguments: str | dict[str, Any] = Field("{}", description="An object, as JSON text or as it is.")

    @model_validator(mode="after")
    def _parse(self) -> Self:
        if isinstance(self.arguments, str):
            if has_more_values(self.arguments.encode(errors="replace"), MAX_ARGUMENT_VALUES):
                raise refusal(f"has more than {MAX_ARGUMENT_VALUES} values", "arguments")
            try:
                self.arguments = json.loads(self.arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise refusal(f"is not JSON: {error}", "arguments") from None
            if not isinstance(self.arguments, dict):
                raise refusal("must be a JSON object", "arguments")
        return self


class ToolCall(RequestBody):
    """A call that an assistant made earlier."""

    harmless: ClassVar[frozenset[str]] = frozenset({"index"})

    id: str | None = Field(None, description="Which `tool_call_id` the answer has.")
    type: Literal["function"] = Field("function", description="Only functions are called.")
    function: FunctionCall = Field(description="What was called.")


class Message(RequestBody):
    """One turn of a conversation."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"function_call": (), "audio": ()}
    harmless: ClassVar[frozenset[str]] = frozenset({"refusal", "annotations", "cache_control"})

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Who speaks; `tool` gives what a call came to.", examples=["user"]
    )
    content: Annotated[str | None, BeforeValidator(_join_parts, json_schema_input_type=str | list[TextPart])] = Field(
        None,
        description="A text, or parts of one, which are joined by line breaks; only an assistant's may be missing.",
        examples=["Tell me a story."],
    )
    name: str | None = Field(None, description="Handed to the chat template.")
    reasoning_content: str | None = Field(None, description="Handed to the chat template.")
    tool_calls: list[ToolCall] = Field([], description="Calls of an assistant, for the chat template.")
    tool_call_id: str | None = Field(None, description="Of role tool: the call that this answers.")

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise refusal(f"is required of role {self.role!r}, and not null", "content")
        if self.tool_calls and self.role != "assistant":
            raise refusal("belong to role 'assistant'", "tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise refusal("belongs to role 'tool'", "tool_call_id")
        return self

    def to_template(self) -> dict[str, Any]:
        """As chat templates read it: arguments of calls are objects."""
        return {
            "role": self.role,
            "content": self.content or "",
            "name": self.name,
            "reasoning_content": self.reasoning_content,
            "tool_calls": [call.model_dump() for call in self.tool_calls] or None,
            "tool_call_id": self.tool_call_id,
        }


class ChatCompletionRequest(SamplingBody):
    """An answer to a conversation."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SamplingBody.unsupported,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
        "store": (False,),
        "web_search_options": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "service_tier": ("auto", "default"),
        # vLLM's
        "documents": ([],),
        "chat_template": (),
        "echo": (False,),
        "include_reasoning": (True, False),
        # SGLang's, which vLLM's router adds to every request
        "separate_reasoning": (True, False),
        "stream_reasoning": (True, False),
        "best_of": (1,),
    }

    messages: list[Message] = Field(
        min_length=1, fail_fast=True, description="The conversation so far, oldest turn first."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Most tokens to generate (default: as many as fit the context)."
    )
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens, which wins.")
    logprobs: bool = Field(False, description="Log-probabilities of the tokens.")
    top_logprobs: int | None = Field(
        None, ge=-1, le=MAX_LOGPROBS, description="Alternatives for each token, -1: all tokens; needs `logprobs`."
    )
    add_generation_prompt: bool | None = Field(
        None, description="End the prompt with what begins an answer (default: yes, unless continue_final_message)."
    )
    continue_final_message: bool = Field(False, description="Go on with the last message instead of a new one.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="More variables for the chat template.")
    add_special_tokens: bool = Field(
        False, description="Let the tokenizer add its special tokens to those that the chat template writes."
    )
    tools: list[Tool] = Field(
        [],
        fail_fast=True,
        description=f"Functions that may be called: at most {MAX_TOOLS}, of {MAX_TOOL_BYTES} bytes of JSON together.",
    )
    tool_choice: ChoosingField | None = Field(
        None,
        description="auto (default): text or calls, as the model chooses. required: calls. none: text. An object: a "
        "call of that function, or a choice among some.",
    )
    parallel_tool_calls: bool = Field(
        True,
        description=f"Up to {MAX_CALLS} calls in an answer, where the model's template can show several; else one.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        self.check_together()
        check_size(self.tools)
        if self.structured_outputs is not None and self.choice is not None:
            raise InvalidRequest(
                "structured_outputs: does not go with tools that may be called; response_format does, for an answer "
                "that calls none",
                param="structured_outputs",
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
        return self

    @property
    def limit(self) -> tuple[str, int | None]:
        """The field that says how many tokens may be generated, and its value."""
        if self.max_completion_tokens is None and self.max_tokens is not None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def choice(self) -> ToolChoice | None:
        """What an answer may be; None: text alone."""
        return choice_of(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def alternatives(self) -> int | None:
        """For each generated token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


def chat_envelope(request_id: str, created: int, model: str, fingerprint: str, *, stream: bool) -> dict[str, Any]:
    """The fields before `choices` of the answer, or of every chunk of a stream; `created` in seconds since 1970."""
    kind = "chat.completion.chunk" if stream else "chat.completion"
    envelope = {"id": f"chatcmpl-{request_id}", "object": kind, "created": created, "model": model}
    return {**envelope, "system_fingerprint": fingerprint}


def chat_choice(
    index: int,
    content: str | None,
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
    stop_reason: int | str | None,
    calls: Sequence[Call] = (),
) -> dict[str, Any]:
    """An entry of `choices` of a whole answer; `stop_reason` is the stop token or text that ended it."""
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message["tool_calls"] = [call_entry(call) for call in calls]
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


def chat_chunk(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    """An entry of `choices` of a stream."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class ChatTop(BaseModel):
    """A token that could have come."""

    token: str = Field(description=r"Its text; `bytes:\xe2` for a token that is no text by itself.")
    logprob: float = Field(description="Natural logarithm; -9999 stands for minus infinity.")
    bytes: list[int] = Field(description="The bytes it stands for.")


class ChatToken(ChatTop):
    """A token that came."""

    top_logprobs: list[ChatTop] = Field(description="The most probable tokens, best first.")


class ChatLogprobs(BaseModel):
    """A row for each token."""

    content: list[ChatToken]
    refusal: None


class ChatCalledFunction(BaseModel):
    """What is called."""

    name: str
    arguments: str = Field(description="JSON text of an object; cut off where finish_reason is length.")


class ChatToolCall(BaseModel):
    """A call."""

    id: str = Field(description="Which `tool_call_id` the message with its result has.")
    type: Literal["function"]
    function: ChatCalledFunction


class ChatMessage(BaseModel):
    """The answer's text or calls."""

    role: Literal["assistant"]
    content: str | None = Field(description="null where there is nothing but calls.")
    refusal: None
    tool_calls: list[ChatToolCall] | None = Field(None, description="Only where functions are called.")


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] = Field(
        description="tool_calls: functions are called, as the model chose or as it must. stop: the end, also of a call "
        "of the function that tool_choice names. length: cut off."
    )
    stop_reason: int | str | None = Field(description="The stop token or text that ended it.")
    token_ids: list[int] | None = Field(None, description="With return_token_ids.")


class ChatCompletionResponse(BaseModel):
    """The answer; it documents the dicts above and is never built."""

    id: str = Field(examples=["chatcmpl-4f1c"])
    object: Literal["chat.completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | None = Field(None, description="As in completions.")
    prompt_token_ids: list[int] | None = Field(None, description="With return_token_ids.")
