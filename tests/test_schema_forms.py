"""What JSON schemas become before they are compiled: numbers that end, closed objects, pydantic's own forms."""

from __future__ import annotations

import json
import re
from typing import Any

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.grammar_source import source_of
from server.engine.request import GrammarSpec
from server.engine.schema_forms import DECIMAL, _decimal, closed, closed_where_silent
from server.engine.vocabulary import Vocabulary
from server.errors import InvalidRequest
from tests.tiny import byte_tokenizer

ONE_BYTE = [bytes([byte]) for byte in range(256)]


def native() -> llguidance.LLTokenizer:
    """A vocabulary of single bytes and an end."""
    return Vocabulary(byte_tokenizer(), [b"", *ONE_BYTE], [0], 0).native()


def longest(schema: dict[str, Any] | bool, text: str, kind: Any = "json_schema") -> tuple[str, bool]:
    """What of a text follows a schema, and whether it may end there."""
    matcher = llguidance.LLMatcher(native(), source_of(GrammarSpec(kind, json.dumps(schema), "p")), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    taken = matcher.try_consume_tokens([byte + 1 for byte in text.encode()])
    return text.encode()[:taken].decode(), bool(matcher.is_accepting())


def fits(schema: dict[str, Any] | bool, text: str, kind: Any = "json_schema") -> bool:
    return longest(schema, text, kind) == (text, True)


LARGEST = "9007199254740992"


@pytest.mark.parametrize("shape", ["alone", "inside", "any", "object"])
def test_numbers_end(shape: str) -> None:
    def number(kind: str, text: str) -> bool:
        if shape == "alone":
            return fits({"type": kind}, text)
        if shape == "inside":
            schema = {"type": "object", "properties": {"a": {"type": ["null", kind], "title": "A"}}, "required": ["a"]}
            return fits(schema, f'{{"a": {text}}}')
        return fits(True, f"[{text}]") if shape == "any" else fits({"type": "object"}, f'{{"a": [{text}]}}')

    for text in ("0", "-7", LARGEST, f"-{LARGEST}"):
        assert number("integer", text) and number("number", text)
    for text in ("0.5", "-12.123456789", "123456.75"):
        assert number("number", text)
    for text in (f"{LARGEST}0", "12345678901234567", "0.1234567891", "0.5000000000", "1e5"):
        assert not number("number", text), text


def test_limits_of_the_schema_itself_hold() -> None:
    assert longest({"type": "integer", "minimum": 3}, "123456789012345678")[0] == "1234567890123456"
    assert not fits({"type": "integer", "minimum": 3}, "2")
    assert fits({"type": "number", "multipleOf": 0.01}, "0.25") and not fits(
        {"type": "number", "multipleOf": 0.01}, "0.255"
    )
    assert fits({"type": "number", "exclusiveMinimum": 0, "maximum": 5}, "4.999") and not fits(
        {"type": "number", "exclusiveMinimum": 0, "maximum": 5}, "0"
    )
    assert fits({"type": "number", "minimum": 1e17, "maximum": 2e17}, "100000000000000000")
    assert fits({"properties": {"n": {"const": 5}}, "$defs": {"a": {"type": "integer"}}}, '{"n": 5}')


def test_many_numbers_are_compiled_once() -> None:
    names = [f"p{i}" for i in range(3000)]
    schema = {"type": "object", "properties": {name: {"type": "number"} for name in names}, "required": names}
    assert longest(schema, '{"p0": 1.5, "p1": 2')[0] == '{"p0": 1.5, "p1": 2'


def test_a_format_that_is_unknown_is_a_note() -> None:
    assert fits({"type": "string", "format": "ipvanyaddress"}, '"x"')
    assert not fits({"type": "string", "format": "date"}, '"x"')
    assert fits({"type": "string", "format": "date"}, '"2026-02-28"')
    for good, bad in (
        (("date-time", "2026-02-28T12:00:00.123456+01:00"), ("date-time", f"2026-02-28T12:00:00.{'1' * 20}Z")),
        (("time", "12:00:00Z"), ("time", f"12:00:00.{'1' * 30}Z")),
        (("duration", "P3DT4H5M"), ("duration", "P20M12345678901D")),
    ):
        assert fits({"type": "string", "format": good[0]}, f'"{good[1]}"')
        assert not fits({"type": "string", "format": bad[0]}, f'"{bad[1]}"')
    assert fits({"enum": [{"format": "sea"}]}, '{"format": "sea"}')


STRICT = {
    "type": "object",
    "properties": {
        "a": {"type": "object", "properties": {"x/y": {"type": "null"}}},
        "b": {"type": "array", "items": {"$ref": "#/$defs/c"}},
    },
    "$defs": {
        "c": {"type": "object", "properties": {"d": {"type": "boolean"}, "e": {"type": "null"}}, "required": ["d"]}
    },
}


def test_a_strict_schema_is_closed_and_complete() -> None:
    whole = '{"a": {"x/y": null}, "b": [{"d": true, "e": null}]}'
    assert fits(STRICT, whole, "strict_schema") and fits(STRICT, whole)
    for text in (
        '{"a": {"x/y": null}}',
        '{"b": []}',
        '{"a": {"x/y": null}, "b": [], "made_up": 1}',
        '{"a": {"x/y": null, "made_up": 1}, "b": []}',
        '{"a": {"x/y": null}, "b": [{"d": true}]}',
        '{"a": {"x/y": null}, "b": [{"d": true, "e": null, "made_up": 1}]}',
    ):
        assert not fits(STRICT, text, "strict_schema"), text
    assert fits(STRICT, '{"a": {"x/y": null, "made_up": 1}}')
    given_schema = json.dumps(STRICT)
    assert closed(closed(STRICT)) == closed(STRICT)
    assert json.dumps(STRICT) == given_schema


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        (
            {"type": "object", "additionalProperties": True},
            "'additionalProperties' is required to be supplied and to be",
        ),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "and to be false"),
        ({"type": ["object", "null"], "additionalProperties": {}}, "and to be false"),
        ({"allOf": [{"type": "object"}, {"type": "object"}]}, "'allOf' is not permitted"),
        ({"type": "object", "patternProperties": {"a": {}}}, "'patternProperties' is not permitted"),
        ({"not": {"type": "string"}}, "'not' is not permitted"),
        ({"type": "object", "properties": {}, "required": ["x"]}, "extra required key 'x' supplied"),
    ],
)
def test_what_a_strict_schema_may_not_ask_for_is_refused_with_its_place(inner: dict[str, Any], says: str) -> None:
    schema = {"type": "object", "properties": {"a/b": {"anyOf": [{"type": "null"}, inner]}}}
    with pytest.raises(InvalidRequest, match=re.escape(says)) as raised:
        source_of(GrammarSpec("strict_schema", json.dumps(schema), "response_format"))
    assert raised.value.message.startswith("response_format: cannot be compiled: at /properties/a~1b/anyOf/1: ")


def test_a_function_that_is_not_strict_is_closed_where_it_says_nothing() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}, "open": {"type": "object"}}}
    shut = closed_where_silent(schema)
    assert fits(shut, "{}") and fits(shut, '{"open": {"made_up": 1}}') and not fits(shut, '{"made_up": 1}')
    for left_alone in (
        {**schema, "additionalProperties": True},
        {**schema, "allOf": [{"properties": {"b": {"type": "null"}}}]},
        {**schema, "patternProperties": {"^b": {"type": "null"}}},
    ):
        assert closed_where_silent(left_alone) == left_alone


def pydantics(max_digits: int | None, decimal_places: int | None) -> str:
    """The pattern of a Decimal of so many digits, in the four forms of pydantic 2.11 to 2.13."""
    if max_digits is None:
        return rf"{DECIMAL}\d*\.?" + (r"\d*$" if decimal_places is None else rf"\d{{0,{decimal_places}}}0*$")
    ahead = rf"(?=[\d.]{{1,{max_digits + 1}}}0*$)"
    if decimal_places is None:
        return rf"{DECIMAL}(?:\d{{0,{max_digits}}}|{ahead}\d*\.\d*0*$)"
    whole = max(0, max_digits - decimal_places)
    return rf"{DECIMAL}(?:\d{{0,{whole}}}|{ahead}\d{{0,{whole}}}\.\d{{0,{decimal_places}}}0*$)"


@given(st.none() | st.integers(1, 30), st.none() | st.integers(0, 30), st.data())
def test_pydantics_decimals_are_written_without_look_ahead(
    max_digits: int | None, decimal_places: int | None, data: st.DataObject
) -> None:
    if max_digits is not None and decimal_places is not None and decimal_places > max_digits:
        decimal_places = max_digits
    pattern = pydantics(max_digits, decimal_places)
    ours = _decimal(pattern.removeprefix(DECIMAL))
    text = data.draw(st.from_regex(re.compile(ours, re.ASCII), fullmatch=True))
    assert re.search(pattern, text), (pattern, ours, text)
    assert len(text) < 40


def test_a_decimal_of_pydantic_compiles() -> None:
    schema = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": pydantics(8, 2)}]}
    assert fits(schema, "12.5") and fits(schema, '"123456.25"')
    assert not fits(schema, '"-"') and not fits(schema, '"1234567.25"') and not fits(schema, '"1.255"')
