"""The four forms of text that the API takes: a text, a list of texts, token ids, a list of lists of token ids."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, ValidationInfo

from server.errors import InvalidRequest


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
        where = name if len(items) == 1 else f"{name}[{i}]"
        if type(item) is not kind:
            raise InvalidRequest(f"{where}: a list must hold either only texts or only lists of token ids", param=where)
        if isinstance(item, str):
            check_text(item, where)
        elif wrong := [token for token in item if type(token) is not int]:
            raise InvalidRequest(f"{where}: {str(wrong[0])[:40]!r} is not a token id", param=where)
    return items


def check_text(text: str, where: str) -> None:
    """Raises InvalidRequest for what JSON can say and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{where}: half a surrogate pair at character {error.start} is no Unicode text", param=where
        ) from None


Inputs = Annotated[
    list[str | list[int]],
    PlainValidator(_parse, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
"""Parsed: one entry per text, which is a string or its token ids. Raises InvalidRequest that names the entry."""
