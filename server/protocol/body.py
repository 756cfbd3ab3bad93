"""What the bodies of all endpoints have in common."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from server.errors import InvalidRequest

MAX_LOGGED = 256  # names

logger = logging.getLogger(__name__)


class RequestBody(BaseModel):
    """A JSON object: null means the default, an unknown field is ignored and logged once.

    Types are strict: "16" is no integer. A field in `unsupported` is known to clients but not to this server; it is
    refused unless it has one of the values listed, which ask for nothing.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in given.items():
            if name in cls.unsupported:
                if value not in cls.unsupported[name]:
                    raise InvalidRequest(f"{name}: is not supported by this server", param=name)
            elif name not in known:
                _log_unknown(cls.__name__, name[:64])
        return given


_logged: set[tuple[str, str]] = set()


def _log_unknown(body: str, name: str) -> None:
    """Once for each name, and for so many names: clients can make up any number of them."""
    if (body, name) in _logged or len(_logged) >= MAX_LOGGED:
        return
    _logged.add((body, name))
    logger.warning("%s: unknown field %r is ignored", body, name)
    if len(_logged) == MAX_LOGGED:
        logger.warning("%d unknown fields were ignored; no further one is logged", MAX_LOGGED)
