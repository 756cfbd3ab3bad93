"""What a user can get wrong, and what the server may refuse: each error knows its place in OpenAI's error body.

UserError
├── InvalidRequest      400  a field is missing, of the wrong type, out of range or not supported
│   └── ContextLength   400  prompt and completion do not fit the context
├── Unauthorized        401  no or a wrong key
├── Forbidden           403  a key that may not do this
├── NotFound            404  unknown model or route
├── MethodNotAllowed    405
├── RequestTimeout      408  headers or a body were sent by halves
├── BodyTooLarge        413
├── QueueFull           429  with Retry-After
├── RateLimited         429  the key's limit, with Retry-After
├── HeadersTooLarge     431
├── Cancelled           499  an operator has cancelled the request
├── EngineError         500  the step that held the request failed
├── Unavailable         503  draining, or the engine has died; with Retry-After
│   └── TooManyConnections
└── TimedOut            504  request_timeout has passed
"""

from __future__ import annotations

import math


class UserError(Exception):
    """An answer in OpenAI's shape: {"error": {"message", "type", "param", "code"}} with `status`."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object, all four keys present."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Extra response headers."""
        return {}


class InvalidRequest(UserError):
    """A field of the request cannot be honoured; `param` names it."""


class ContextLength(InvalidRequest):
    """Prompt and completion together are longer than the context of `limit` tokens.

    Clients look for these words, and cut their prompts then.
    """

    code = "context_length_exceeded"

    def __init__(self, reason: str, limit: int, *, param: str) -> None:
        super().__init__(f"{reason}. This model's maximum context length is {limit} tokens", param=param)


class Unauthorized(UserError):
    """No or a wrong API key."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(UserError):
    """The key that was sent may not do this."""

    status = 403
    type = "permission_error"
    code = "admin_key_required"


class NotFound(UserError):
    """There is no such model or route."""

    status = 404


class MethodNotAllowed(UserError):
    """The route takes other methods."""

    status = 405

    def __init__(self, message: str, *, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed

    def headers(self) -> dict[str, str]:
        return {"Allow": self.allowed}


class RequestTimeout(UserError):
    """The rest of a request did not come."""

    status = 408


class HeadersTooLarge(UserError):
    """The request's headers have more bytes than the server takes, or are too many."""

    status = 431


class BodyTooLarge(UserError):
    """The request's body has more bytes than the server takes."""

    status = 413

    def headers(self) -> dict[str, str]:
        return {"Connection": "close"}  # the rest of the body is not read


class QueueFull(UserError):
    """The waiting queue is full; the client should come back."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


class RateLimited(UserError):
    """The key has used what it may; `retry_after` seconds later there is some more."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def headers(self) -> dict[str, str]:
        return {
            "Retry-After": str(math.ceil(self.retry_after)),
            "retry-after-ms": str(math.ceil(1e3 * self.retry_after)),
        }


class Cancelled(UserError):
    """The request was cancelled by its id."""

    status = 499  # nginx' number for requests that ended before their answer
    type = "request_cancelled"
    code = "request_cancelled"

    def __init__(self) -> None:
        super().__init__("the request was cancelled")


class EngineError(UserError):
    """The engine failed while it computed this request."""

    status = 500
    type = "server_error"
    code = "engine_error"


class Unavailable(UserError):
    """The server is draining or its engine has died."""

    status = 503
    type = "server_error"
    code = "unavailable"

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "5"}  # by then another server has taken over, or this one has started again


class TooManyConnections(Unavailable):
    """No connection is idle, and no more may be opened."""

    code = "too_many_connections"

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


class TimedOut(UserError):
    """The request took longer than the server allows."""

    status = 504
    type = "server_error"
    code = "request_timeout"

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}  # OpenAI's clients would ask for the same work again
