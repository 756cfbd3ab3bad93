"""Bodies as strict JSON: what Python's parser accepts beyond the standard is refused by name."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from typing import Any, cast

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope

from server.errors import InvalidRequest
from server.protocol.json_size import check_num_values

MAX_DEPTH = 64  # objects and arrays within one another; more would only test the recursion of the code that reads them
SMALL = 1 << 14  # bytes; below, a body is read before a thread would have started


class JsonRoute(APIRoute):
    """A route whose body is read by `parse_json` and checked against the endpoint's model, both beside the event loop;
    every router that takes a body has it as its route_class."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        field = self.body_field
        model = None if field is None else cast(type[BaseModel], field.field_info.annotation)

        async def with_strict_json(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive, model))

        return with_strict_json


class _StrictRequest(Request):
    def __init__(self, scope: Scope, receive: Receive, model: type[BaseModel] | None) -> None:
        super().__init__(scope, receive)
        self._model = model

    async def json(self) -> Any:
        """The body as the route's model, which FastAPI then takes as it is."""
        body, limit = await self.body(), self.app.state.settings.max_body_values
        if len(body) <= SMALL:
            return read_body(body, self._model, limit)
        return await asyncio.to_thread(read_body, body, self._model, limit)


def read_body(body: bytes, model: type[BaseModel] | None, max_values: int) -> Any:
    """An instance of `model`, or the plain value if there is none or the body is no object.

    Raises:
        RequestValidationError: a field is wrong; only the first one is told.
        json.JSONDecodeError, InvalidRequest: as `parse_json`.
    """
    value = parse_json(body, max_values)
    if model is None or not isinstance(value, dict):
        return value
    try:
        return model.model_validate(value)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_input=False)[0]
        raise RequestValidationError([{**first, "loc": ("body", *first["loc"])}]) from None


def parse_json(body: bytes, max_values: int | None = None) -> Any:
    """The value of a JSON text in UTF-8. A thread that reads a long one lets others run, for as long as it has no more
    than some 100,000 values.

    Raises:
        json.JSONDecodeError: it is no JSON.
        InvalidRequest: it has more than `max_values` values, is not UTF-8, nests deeper than MAX_DEPTH, has a name
            twice in an object, a number that is none (NaN, Infinity) or that no float holds (1e999), or an integer of
            thousands of digits.
    """
    if max_values is not None:
        check_num_values(body, max_values, "the body")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} cannot be read") from None
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python converts no integer of more than some thousand digits
        raise InvalidRequest("the body has an integer with too many digits") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidRequest(f"{name[:64]}: is given twice", param=name[:64])
            seen.add(name)
    return found


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise InvalidRequest(f"the body has a number that is too large: {digits[:40]}")
    return value


def _constant(name: str) -> None:
    raise InvalidRequest(f"the body is not valid JSON: {name} is no number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the body nests more than {MAX_DEPTH} objects and arrays within one another")
