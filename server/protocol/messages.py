"""The messages of a conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, ValidationInfo

from server.errors import InvalidRequest
from server.protocol.inputs import check_text


class TextPart(BaseModel):
    """A piece of a content."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn; other keys, such as `name`, are for the chat template."""

    role: str = Field(description="system, user, assistant, or what the chat template knows.", examples=["user"])
    content: str | list[TextPart] | None = Field(
        None, description="The text, or pieces of it, which are joined by line breaks.", examples=["Tell me a story."]
    )


def _parse(value: Any, info: ValidationInfo) -> list[dict[str, Any]]:
    name = str(info.field_name)
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{name}: must be a list of messages, not empty", param=name)
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{where}: must be an object with a role and a content", param=where)
    check_text(message["role"], f"{where}.role")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str | None):
        raise InvalidRequest(f"{where}.content: must be a text or a list of text parts", param=f"{where}.content")
    check_text(content or "", f"{where}.content")
    return {**message, "content": content}


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{where}: only parts of type text are supported, with a text", param=where)
    text: str = part["text"]
    return text


Messages = Annotated[
    list[dict[str, Any]],
    PlainValidator(_parse, json_schema_input_type=Annotated[list[ChatMessage], Field(min_length=1)]),
]
"""Parsed: dictionaries for a chat template, whose `content` is a string or None."""
