"""The four forms of text that the API takes: a text, a list of texts, token ids, a list of lists of token ids."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, PlainValidator, ValidationInfo

from server.errors import InvalidRequest
from server.protocol.json_size import check_num_values

MODEL: Any = Field(None, description="Name of the model (default: the one that is served).", examples=["lpa-tiny"])
"""The field that every body has."""


def check_input(value: Any, where: str) -> str | list[int]:
    """A text or its token ids, which may be empty; raises InvalidRequest that names `where`."""
    if isinstance(value, str):
        check_text(value, where)
        return value
    if not isinstance(value, list):
        raise InvalidRequest(f"{where}: must be a text or a list of token ids", param=where)
    if not set(map(type, value)) <= {int}:
        wrong = next(token for token in value if type(token) is not int)
        raise InvalidRequest(f"{where}: {str(wrong)[:40]!r} is not a token id", param=where)
    return value


def check_text(text: str, where: str) -> None:
    """Raises InvalidRequest for lone surrogates, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{where}: half a surrogate pair at character {error.start} is no Unicode text", param=where
        ) from None


def _parse(value: Any, info: ValidationInfo) -> list[str | list[int]]:
    name = str(info.field_name)
    if isinstance(value, str):
        items: list[Any] = [value]
    elif isinstance(value, list) and value:
        items = [value] if type(value[0]) is int else value
    else:
        items = []
    kind = type(items[0]) if items else None
    if kind not in (str, list):
        raise InvalidRequest(
            f"{name}: must be a text, a list of texts, a list of token ids or a list of lists of token ids, none empty",
            param=name,
        )
    for i, item in enumerate(items):
        where = entry_loc(name, i, len(items))
        if type(item) is not kind:
            raise InvalidRequest(f"{where}: a list must hold either only texts or only lists of token ids", param=where)
        check_input(item, where)
    return items


def value_of_line(line: bytes, where: str, max_values: int) -> Any:
    """The JSON of a line of a body; InvalidRequest names the line."""
    check_num_values(line, max_values, where)
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{where}: is not UTF-8 at byte {error.start}", param=where) from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}: is not valid JSON: {error}", param=where) from None


def lines_openapi(lines: str, example: str, **answers: Any) -> dict[str, Any]:
    """What FastAPI cannot know of a route whose body and answer may also be lines: `lines` says what those of a body
    are. `answers` are more media types of the answer."""
    described = {
        "type": "string",
        "description": f"{lines}; blank lines are skipped. The other fields of a JSON body are query parameters then. "
        "Read the answer of a stream while you send: the server reads on only as far as its answers are taken.",
    }
    content = {"application/x-ndjson": {"schema": {"type": "string"}, "example": example}, **answers}
    return {
        "requestBody": {"content": {"application/x-ndjson": {"schema": described}}},
        "responses": {"200": {"content": content}},
    }


def entry_loc(field: str, index: int, count: int) -> str:
    """The name of an entry in messages: the field itself if it is the only one."""
    return field if count == 1 else f"{field}[{index}]"


Inputs = Annotated[
    list[str | list[int]],
    PlainValidator(_parse, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
"""Parsed: one entry per text, which is a string or its token ids. Raises InvalidRequest that names the entry."""


ADD_SPECIAL_TOKENS: bool = Field(
    True,
    description="Let the tokenizer add its special tokens, such as BOS, to texts; token ids are taken as they are.",
)


def _parse_one(value: Any, info: ValidationInfo) -> str | list[int]:
    return check_input(value, str(info.field_name))


Input = Annotated[str | list[int], PlainValidator(_parse_one, json_schema_input_type=str | list[int])]
"""One text, a string or its token ids, which may be empty."""
