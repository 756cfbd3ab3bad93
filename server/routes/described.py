"""How the OpenAPI document describes the answers of a route."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

# `openapi` adds the schema: given the model, FastAPI makes a validator for each status of each route
ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
ERRORS = {
    400: "A field, which `param` names, is missing, of the wrong type, out of range or not supported; or the body is "
    "no JSON object.",
    401: "No key, or a wrong one, where the server has keys.",
    403: "The key may not do this.",
    404: "There is no such model, request or route.",
    413: "The body has more bytes than the server takes.",
    429: "The queue is full, or the key has used what it may; Retry-After says in how many seconds to try again.",
    499: "The request was cancelled by its id.",
    500: "The server failed on this request.",
    503: "The server is starting or stopping, or its engine has died.",
    504: "The request took longer than the server's request_timeout.",
}
ANY = (401, 500)
WITH_BODY = (400, 404, 413)
WITH_ENGINE = (*WITH_BODY, 429, 499, 503, 504)

EVENTS = {
    "text/event-stream": {
        "example": 'data: {"id": "cmpl-4f1c", "choices": [{"index": 0, "text": " a king"}]}\n\ndata: [DONE]\n\n'
    }
}


def responses(
    model: type[BaseModel] | None, *statuses: int, streams: bool = False, description: str = "The answer."
) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: `model` with 200 where the endpoint returns none itself (with `streams` also as events),
    and errors of these statuses, beside those that any route may have."""
    good: dict[str, Any] = {"description": description}
    if model is not None:
        good["model"] = model
    if streams:
        good["content"] = EVENTS
    errors = {status: {"description": ERRORS[status], "content": ERROR} for status in {*ANY, *statuses}}
    return {200: good, **dict(sorted(errors.items()))}
