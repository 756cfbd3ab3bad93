"""What a user can get wrong, and what the server may refuse: each error knows its place in OpenAI's error body.

UserError
├── InvalidRequest      400  a field is missing, of the wrong type, out of range or not supported
│   └── ContextLength   400  prompt and completion do not fit the context
├── Unauthorized        401
├── NotFound            404  unknown model or route
├── QueueFull           429  with Retry-After
├── EngineError         500  the step that held the request failed
└── Unavailable         503  draining, or the engine has died
"""

from __future__ import annotations


class UserError(Exception):
    """An answer in OpenAI's shape: {"error": {"message", "type", "param", "code"}} with `status`."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object, all four keys present."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Extra response headers."""
        return {}


class InvalidRequest(UserError):
    """A field of the request cannot be honoured; `param` names it."""


class ContextLength(InvalidRequest):
    """Prompt and completion together are longer than the context."""

    code = "context_length_exceeded"


class Unauthorized(UserError):
    """No or a wrong API key."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFound(UserError):
    """There is no such model or route."""

    status = 404

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        self.code = code


class QueueFull(UserError):
    """The waiting queue is full; the client should come back."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


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
