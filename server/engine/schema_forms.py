"""What becomes of a client's JSON schema before it is compiled: numbers that end, objects that are closed.

What fits the result fits the schema that was given.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from server.engine.json_schema import EXACT, NAMES, NOTES

FRACTION = 1e-9  # numbers are multiples of it: nine digits after the point, no exponent
MOST_DIGITS = 15  # before and after the point of a decimal number in a string
ANY, NUMBER = "lpa:any", "lpa:number"  # definitions of any JSON value, and of any number
RANGE = frozenset({"type", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"})
FORMATS = frozenset(
    {"date", "date-time", "duration", "email", "hostname", "idn-email", "idn-hostname", "ipv4", "ipv6", "time", "uuid"}
    | {"iri", "iri-reference", "json-pointer", "regex", "relative-json-pointer", "unknown", "uri", "uri-reference"}
    | {"uri-template"}
)
"""Those that llguidance knows; to a JSON schema, any other is a note."""

DURATION = r"^P(\d{1,4}D|(\d{1,4}D)?T(\d{1,4}H(\d{1,4}M(\d{1,4}S)?)?|\d{1,4}M(\d{1,4}S)?|\d{1,4}S))$"  # up to days
LONGEST_TIME = 32  # characters: a date, a time with microseconds, an offset
ALTERNATIVES = frozenset({"allOf", "anyOf", "oneOf"})
ELSEWHERE = ALTERNATIVES | {"$ref", "if", "dependentSchemas", "patternProperties", "unevaluatedProperties", "not"}
"""Keywords by which properties may be named outside of `properties`."""

NOT_STRICT = (
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "patternProperties"),
    *("unevaluatedProperties", "propertyNames"),
)
DECIMAL = r"^(?!^[-+.]*$)[+-]?0*"  # how pydantic's patterns of a Decimal begin


def bounded(schema: dict[str, Any] | bool) -> dict[str, Any]:
    """A schema whose integers have at most 16 digits, and its numbers 9 more after the point, unless it says itself
    how large they are. Durations and times end, too. Also without formats that are unknown, and without the look-ahead
    of pydantic's decimals."""
    if schema is False:
        return {"not": {}}
    shared: dict[str, Any] = {}  # definitions: a range that is written once is compiled once
    alone = "$id" not in schema if isinstance(schema, dict) else True  # else references mean something else
    found = _each(schema if isinstance(schema, dict) else {}, lambda inner: _bounded(inner, shared if alone else None))
    if ANY in shared:
        shared[NUMBER] = _NUMBER
    return {**found, "$defs": {**found.get("$defs", {}), **shared}} if shared else found


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema as OpenAI's `strict` has it: objects have all of their properties and no other.

    Raises:
        ValueError: it asks for something else; the message says where and what.
    """
    return _each(schema, _closed)


def closed_where_silent(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema whose objects have no other properties than those they name, unless they say that they may."""
    if "allOf" in repr(schema):  # what one part names is another property to the next
        return schema
    return _each(schema, _closed_where_silent)


def _each(
    schema: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]], place: str = ""
) -> dict[str, Any]:
    """A schema with every schema inside of it, and then itself, changed."""
    found: dict[str, Any] = {}
    for key, value in schema.items():
        step = f"{place}/{key}"
        if key in NAMES and isinstance(value, dict):
            value = {
                name: _each(inner, change, f"{step}/{name.replace('~', '~0').replace('/', '~1')}")
                if isinstance(inner, dict)
                else inner
                for name, inner in value.items()
            }
        elif key in ALTERNATIVES | {"prefixItems", "items"} and isinstance(value, list):
            value = [
                _each(inner, change, f"{step}/{i}") if isinstance(inner, dict) else inner
                for i, inner in enumerate(value)
            ]
        elif key in ("items", "additionalProperties", "if", "then", "else", "not", "contains", "propertyNames"):
            value = _each(value, change, step) if isinstance(value, dict) else value
        found[key] = value
    try:
        return change(found)
    except _Refused as refused:
        raise ValueError(f"at {place or 'the top'}: {refused}") from None


class _Refused(Exception):
    """Why a schema is not strict."""


def _types(schema: dict[str, Any]) -> tuple[Any, ...]:
    found = schema.get("type")
    return tuple(found) if isinstance(found, list) else (found,)


def _bounded(schema: dict[str, Any], shared: dict[str, Any] | None) -> dict[str, Any]:
    """`shared` takes definitions that the result refers to; None: it refers to none."""
    found, types = dict(schema), _types(schema)
    if "integer" in types or "number" in types:
        lowest = _number(schema, "minimum", "exclusiveMinimum")
        highest = _number(schema, "maximum", "exclusiveMaximum")
        if lowest is None and (highest is None or highest > -EXACT):
            found["minimum"] = -EXACT
        if highest is None and (lowest is None or lowest < EXACT):
            found["maximum"] = EXACT
        if "number" in types and "multipleOf" not in schema:
            found["multipleOf"] = FRACTION
        range_alone = {key: value for key, value in found.items() if key not in NOTES}
        if shared is not None and range_alone.keys() <= RANGE:
            name = "lpa:" + hashlib.sha256(json.dumps(range_alone, sort_keys=True).encode()).hexdigest()[:32]
            shared[name] = range_alone
            return _reference(name)
    form = schema.get("format")
    if isinstance(form, str) and form not in FORMATS:
        del found["format"]
    if form == "duration" and "pattern" not in schema:
        found["pattern"] = DURATION
    if form in ("date-time", "time"):
        found["maxLength"] = min(LONGEST_TIME, schema.get("maxLength", LONGEST_TIME))
    if isinstance(pattern := schema.get("pattern"), str) and pattern.startswith(DECIMAL):
        found["pattern"] = _decimal(pattern.removeprefix(DECIMAL))
    if shared is None:
        return found
    if not found.keys() - NOTES:
        shared[ANY] = _ANY_VALUE
        return _reference(ANY)
    if "object" in types and not ELSEWHERE & schema.keys() and schema.get("additionalProperties", True) is True:
        shared[ANY] = _ANY_VALUE
        found["additionalProperties"] = _reference(ANY)
    return found


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def _number(schema: dict[str, Any], *keys: str) -> float | None:
    given = [value for key in keys if isinstance(value := schema.get(key), int | float) and value is not True]
    return given[0] if given else None


def _decimal(rest: str) -> str:
    """A pattern without look-ahead for pydantic's of a Decimal, whose `rest` says how many digits it has: some of the
    numbers that it allows."""
    total = re.search(r"\{1,(\d+)\}", rest)
    places = re.search(r"\\\.\??\\d\{0,(\d+)\}", rest)
    after = min(int(places[1]), MOST_DIGITS) if places else MOST_DIGITS
    if total is None:
        before = MOST_DIGITS
    else:
        digits = int(total[1]) - 1  # with the point
        if places is None:
            after = min(MOST_DIGITS, digits // 2)
        before = min(digits - after, MOST_DIGITS)
    whole = rf"\d{{1,{before}}}" if before > 0 else "0"
    return rf"^[+-]?{whole}(\.\d{{1,{after}}})?$" if after > 0 else rf"^[+-]?{whole}$"


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    for keyword in NOT_STRICT:
        if keyword in schema:
            raise _Refused(f"{keyword!r} is not permitted in a strict schema")
    if isinstance(parts := schema.get("allOf"), list) and len(parts) > 1:
        raise _Refused("'allOf' is not permitted in a strict schema")
    if "object" not in _types(schema) and "properties" not in schema:
        return schema
    if schema.get("additionalProperties", False) is not False:
        raise _Refused("'additionalProperties' is required to be supplied and to be false in a strict schema")
    properties = schema.get("properties", {})
    for name in schema.get("required", ()) if isinstance(schema.get("required"), list) else ():
        if name not in properties:
            raise _Refused(f"extra required key {str(name)[:64]!r} supplied")
    return {**schema, "additionalProperties": False, "required": list(properties)}


def _closed_where_silent(schema: dict[str, Any]) -> dict[str, Any]:
    if "properties" not in schema or "additionalProperties" in schema or ELSEWHERE & schema.keys():
        return schema
    return {**schema, "additionalProperties": False}


_NUMBER = {"type": "number", "minimum": -EXACT, "maximum": EXACT, "multipleOf": FRACTION}
_ANY_VALUE: dict[str, Any] = {
    "anyOf": [
        {"type": ["null", "boolean", "string"]},
        _reference(NUMBER),
        {"type": "array", "items": _reference(ANY)},
        {"type": "object", "additionalProperties": _reference(ANY)},
    ]
}
