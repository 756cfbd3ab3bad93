"""/v1/responses: the answer, built as a plain dict for speed, and the types that document it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from server.protocol.responses import ResponsesRequest


def response_fields(
    body: ResponsesRequest, response_id: str, created: int, model: str, sampling: Mapping[str, float]
) -> dict[str, Any]:
    """A response that has begun; `sampling` are temperature and top_p as they are used."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": body.store,
        "temperature": sampling["temperature"],
        "text": {
            "format": body.text.format.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True)
            | {"type": body.text.format.type}
        },
        "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
        "tools": [{"strict": bool(t.strict), **t.model_dump(exclude={"strict"})} for t in body.tools],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling["top_p"],
        "truncation": "disabled",
        "usage": None,
    }


def usage_fields(input_tokens: int, output_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Tokens of a response."""
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": input_tokens + output_tokens,
    }


class IncompleteDetails(BaseModel):
    """Why a response is cut off."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class InputTokensDetails(BaseModel):
    """Where input tokens came from."""

    cached_tokens: int = Field(description="Found in the prefix cache.")
    cache_write_tokens: int = Field(description="Always 0: the prefix cache is not billed.")


class OutputTokensDetails(BaseModel):
    """What output tokens are."""

    reasoning_tokens: int = Field(description="Always 0.")


class ResponseUsage(BaseModel):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponsesResponse(BaseModel):
    """A response; it documents the dict above and is never built."""

    id: str = Field(examples=["resp_4f1c"])
    object: Literal["response"]
    created_at: int = Field(description="Seconds since 1970.")
    completed_at: int | None = Field(description="With status completed.")
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: ResponseFailure | None = Field(description="With status failed.")
    incomplete_details: IncompleteDetails | None = Field(description="With status incomplete.")
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]] = Field(description="Items: a message with its text, calls of functions.")
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, None]
    service_tier: Literal["default"]
    store: bool = Field(description="Whether it is kept, as requested and within the server's limits.")
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class DeletedResponse(BaseModel):
    """A response that is no longer stored."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputItemList(BaseModel):
    """Some of the items that a response answers."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
