"""What llguidance silently gets wrong in a JSON schema: found, with its path, before it is compiled."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

EXACT = 2**53  # the integers up to here are float64 numbers, as which llguidance reads every number
EXACT_DIGITS = 15  # so many digits of a decimal number survive float64
NAMES = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)  # hold schemas by name
NOTES = frozenset({"default", "example", "examples", "title", "description", "$comment"})  # demand nothing of a text
LITERALS = frozenset({"const", "enum"})


def find_fault(schema: Any) -> str | None:
    """What makes a schema unusable, as "at PLACE: reason" with a JSON pointer; None if nothing does.

    Numbers that lose digits would demand another number than the one written, and half a surrogate pair is no text.
    """
    pending: list[tuple[Any, str, str]] = [(schema, "", "schema")]  # and whether keys are keywords, names or neither
    while pending:
        value, place, kind = pending.pop()
        if reason := _fault_of(value):
            return f"at {place or 'the top'}: {reason}"
        if isinstance(value, list):
            pending += [(child, f"{place}/{i}", kind) for i, child in reversed(list(enumerate(value)))]
        if isinstance(value, dict):
            for key, child in reversed(value.items()):
                step = f"{place}/{key.replace('~', '~0').replace('/', '~1')}"
                if kind == "schema" and key in NOTES:
                    continue
                pending.append((child, step, _kind_of(kind, key)))
    return None


def _kind_of(kind: str, key: str) -> str:
    if kind != "schema":
        return "schema" if kind == "names" else kind
    return "literal" if key in LITERALS else "names" if key in NAMES else "schema"


def _fault_of(value: Any) -> str | None:
    if isinstance(value, str):
        return None if _is_text(value) else "half a surrogate pair is no Unicode text"
    if isinstance(value, dict):
        return None if all(map(_is_text, value)) else "a name has half a surrogate pair, which is no Unicode text"
    if isinstance(value, int):
        return (
            None if abs(value) <= EXACT else f"{str(value)[:40]} would lose digits: integers end at 2^53; use a string"
        )
    if isinstance(value, float):
        if not math.isfinite(value):
            return f"{value} is no number of JSON"
        digits = len(Decimal(repr(value)).normalize().as_tuple().digits)
        return None if digits <= EXACT_DIGITS else f"{value!r} would lose digits: numbers have at most {EXACT_DIGITS}"
    return None


def _is_text(value: str) -> bool:
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
