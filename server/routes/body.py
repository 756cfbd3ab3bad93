"""Bodies as JSON, strictly: what Python's reader lets through beyond the standard is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from server.errors import InvalidRequest

MAX_DEPTH = 64  # objects and arrays within one another; more would only test the recursion of whatever reads them


class JsonRoute(APIRoute):
    """A route whose body is read by `parse_json`; every router that takes a body has it as its route_class."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def with_strict_json(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return with_strict_json


class _StrictRequest(Request):
    async def json(self) -> Any:
        return parse_json(await self.body())


def parse_json(body: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        json.JSONDecodeError: it is no JSON.
        InvalidRequest: it is not UTF-8, nests deeper than MAX_DEPTH, has a name twice in an object, a number that is
            none (NaN, Infinity) or that no float holds (1e999), or an integer of thousands of digits.
    """
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
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"{twice[:64]}: is given twice", param=twice[:64])
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
