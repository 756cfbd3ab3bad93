"""What the bodies of all endpoints have in common."""

from __future__ import annotations

import difflib
import logging
from contextvars import ContextVar
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

MAX_LOGGED = 256  # names

logger = logging.getLogger(__name__)

REFUSED = "refused"
"""Type of the errors that `refusal` makes."""

HARMLESS = frozenset(
    {
        "cache_prompt",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "session_id",
        "user",
    }
)
"""Fields that clients send along and that change nothing in an answer: taken and not used."""

MOST_NAMED = 8  # ignored fields of one request that the log names

ignore_unknown_fields: ContextVar[bool] = ContextVar("ignore_unknown_fields", default=False)
"""Whether unknown fields of the bodies that are read now are ignored, and logged once, instead of refused."""


def refusal(reason: str, *loc: str | int, code: str | None = None) -> PydanticCustomError:
    """What a validator raises; `loc` is relative to what is validated, and the answer names it from the body's top."""
    return PydanticCustomError(REFUSED, "{reason}", {"reason": reason, "loc": loc, "code": code})


class RequestBody(BaseModel):
    """A JSON object: null means the default, and an unknown field is refused.

    Types are strict: "16" is no integer. A field in `unsupported` is known to clients but not to this server; it is
    refused unless it has one of the values listed, which ask for nothing. A field in `harmless` is taken and not used.
    One in `aliases` is another name of ours, or of a field inside of ours ("structured_outputs.regex").
    """

    model_config = ConfigDict(strict=True, extra="ignore", json_schema_extra={"additionalProperties": False})

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}
    harmless: ClassVar[frozenset[str]] = frozenset()
    aliases: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        given: dict[str, Any] = {}
        ignored = []
        for name, value in data.items():
            if value is None:
                continue
            if name in known:
                given[name] = value
            elif name in cls.unsupported:
                if value not in cls.unsupported[name]:
                    raise refusal("is not supported by this server", name)
            elif name not in cls.aliases and name not in cls.harmless:
                if not ignore_unknown_fields.get():
                    raise _unknown(name, [*known, *cls.aliases])
                ignored.append(name)
        for name in ignored[:MOST_NAMED]:
            _log_unknown(cls.__name__, name[:64])
        for name in cls.aliases.keys() & data.keys():
            if (value := data[name]) is not None:
                field, _, inner = cls.aliases[name].partition(".")
                if field in given:
                    raise refusal(f"says what {field} says, which is given too", name)
                given[field] = {inner: value} if inner else value
        return given


def _unknown(name: str, known: list[str]) -> PydanticCustomError:
    near = difflib.get_close_matches(name[:64], known, 1)
    hint = f"; is {near[0]} meant?" if near else ""
    return refusal(f"is unknown to this server{hint}", name[:64], code="unknown_parameter")


_logged: set[tuple[str, str]] = set()


def _log_unknown(body: str, name: str) -> None:
    """Once for each name, and for so many names: clients can make up any number of them."""
    if (body, name) in _logged or len(_logged) >= MAX_LOGGED:
        return
    _logged.add((body, name))
    logger.warning("%s: unknown field %r is ignored", body, name)
    if len(_logged) == MAX_LOGGED:
        logger.warning("%d unknown fields were ignored; no further one is logged", MAX_LOGGED)
