"""Clients' schemas, expressions, lists and grammars as llguidance's own form, and what is wrong with them.

Library code that is not ours reads what strangers wrote here: it may crash, hang or take gigabytes. So `try_out` runs
in a process of its own (`grammar_workers`), and the server compiles only what has passed it. No torch.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from server.engine.json_schema import find_fault
from server.engine.request import GrammarSpec
from server.engine.schema_forms import bounded, closed, closed_where_silent
from server.engine.tool_grammar import lark_source
from server.errors import InvalidRequest

MAX_TEXT = 1 << 17  # characters of an expression, grammar or list
MAX_SCHEMA = 1 << 20  # characters of a schema: 5,000 properties with their descriptions
MAX_STEP_SECONDS = 1.0  # of processor time for one token: its mask, or to follow it
MAX_ATTEMPTS = 256  # subschemas tried per level, to say where a schema is wrong
EXPLAIN_SECONDS = 1.0  # of processor time for that
WALKS, WALK_TOKENS = 3, 24
NOTHING_FITS = "NoExtensionBias"  # no token of the vocabulary; a model may never reach that position
JSON_SPACE = r" |\n {0,16}"
WITH_SCHEMAS = frozenset({"json_object", "json_schema", "strict_schema", "tools"})


def limits_of(spec: GrammarSpec) -> llguidance.LLParserLimits:
    """Limits of one compilation and one mask. A row of the parser has four items for each property of an object;
    the time of an ambiguous grammar's step grows with their square."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,  # about 20 ms
        step_lexer_fuel=100_000,  # about 7 ms of one mask
        # 50,000 are about 3 ms of one mask; an object of 5,000 optional properties needs more
        step_max_items=400_000 if spec.kind in WITH_SCHEMAS else 50_000,
        max_items_in_row=25_000 if spec.kind in WITH_SCHEMAS else 2_000,
        max_lexer_states=50_000,  # about 100 MB
        max_grammar_size=250_000,
        verbose_errors=False,
    )


def try_out(vocabulary: llguidance.LLTokenizer, spec: GrammarSpec) -> str:
    """Do with a grammar what the server will do: compile it, then follow it for some tokens along a few ways.

    Returns:
        What the server's own matcher is built from.

    Raises:
        InvalidRequest: it cannot be compiled, or a token takes too long; the message says where and why.
    """
    source = source_of(spec)
    first = new_matcher(vocabulary, source, spec)
    if first.is_error():
        for part in _schemas_of(spec) if spec.kind == "tools" else ():
            try_out(vocabulary, part)
        raise _invalid(spec, f"cannot be compiled: {_explain(spec, first.get_error())}")
    failures = [_follow(first.deep_copy(), spec, random.Random(walk)) for walk in range(WALKS)]
    if all(failures):
        raise _invalid(spec, f"is too complex: {failures[0]}")
    return source


def new_matcher(vocabulary: llguidance.LLTokenizer, source: str, spec: GrammarSpec) -> llguidance.LLMatcher:
    """A matcher at the beginning of the text, or in its error state. Its first mask is computed, so that copies find
    that work done."""
    matcher = llguidance.LLMatcher(vocabulary, source, log_level=0, limits=limits_of(spec))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


def check_length(spec: GrammarSpec) -> None:
    """Raises InvalidRequest for a text that is too long to be tried."""
    most = MAX_SCHEMA if spec.kind in WITH_SCHEMAS else MAX_TEXT
    if len(spec.text) > most:
        raise _invalid(spec, f"has {len(spec.text)} characters; at most {most} can be compiled")


def source_of(spec: GrammarSpec) -> str:
    """llguidance's form of a grammar.

    Raises:
        InvalidRequest: it is none of its kind.
    """
    try:
        return _SOURCES[spec.kind](spec)
    except ValueError as error:  # UnicodeEncodeError too
        raise _invalid(spec, f"cannot be compiled: {first_line(str(error))}") from None


def _follow(matcher: llguidance.LLMatcher, spec: GrammarSpec, rng: random.Random) -> str:
    """Some tokens that the grammar allows, as a model might choose them; returns which limit ended that, or ""."""
    for _ in range(WALK_TOKENS):
        began = time.thread_time()
        mask = matcher.compute_bitmask()
        _check_time(spec, began)
        if matcher.is_error() or matcher.is_stopped() or (token := _some_bit(mask, rng)) is None:
            break
        began = time.thread_time()
        followed = matcher.consume_token(token)
        _check_time(spec, began)
        if not followed:
            break
    error = first_line(matcher.get_error()) if matcher.is_error() else ""
    return "" if error == NOTHING_FITS else error


def _check_time(spec: GrammarSpec, began: float) -> None:
    if time.thread_time() - began > MAX_STEP_SECONDS:
        raise _invalid(spec, f"is too complex: a single token takes more than {MAX_STEP_SECONDS:g} seconds")


def _some_bit(mask: Sequence[int], rng: random.Random) -> int | None:
    """The number of a bit that is set; None if none is."""
    start = rng.randrange(len(mask))
    for at in (*range(start, len(mask)), *range(start)):
        if byte := mask[at]:
            bits = [bit for bit in range(8) if byte >> bit & 1]
            return int(8 * at + rng.choice(bits))
    return None


def _invalid(spec: GrammarSpec, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{spec.param}: {reason}", param=spec.param)


def _json_schema(spec: GrammarSpec) -> str:
    text = json.dumps(_schema(spec))
    return llguidance.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": JSON_SPACE})


def _schema(spec: GrammarSpec) -> dict[str, Any]:
    """The schema that is compiled for a client's."""
    schema = {"type": "object"} if spec.kind == "json_object" else _parse_json(spec)
    if not isinstance(schema, dict | bool):
        raise _invalid(spec, "a JSON schema is an object or a boolean")
    fault = find_fault(schema)
    if not fault and spec.kind == "strict_schema" and isinstance(schema, dict):
        try:
            schema = closed(schema)
        except ValueError as error:
            fault = str(error)
    if fault:
        raise _invalid(spec, f"cannot be compiled: {fault}")
    return bounded(schema)


def _tools(spec: GrammarSpec) -> str:
    described = json.loads(spec.text)
    schemas = [
        json.dumps({**_schema(part), "x-guidance": {"whitespace_pattern": JSON_SPACE}}) for part in _schemas_of(spec)
    ]
    text = schemas.pop() if described["text"] else None
    return llguidance.LLMatcher.grammar_from_lark(lark_source(described, schemas, text))


def _schemas_of(spec: GrammarSpec) -> Iterator[GrammarSpec]:
    """Those of functions' arguments, and then that of a text, which may have one."""
    described = json.loads(spec.text)
    for function in described["functions"]:
        param = f"{spec.param}{function['where']}"
        schema = function["parameters"]
        if schema is None:
            schema = {"type": "object", "properties": {}}
        if (kind := schema.setdefault("type", "object")) != "object":
            raise InvalidRequest(f"{param}: must be a JSON schema of type 'object', not {kind!r}"[:200], param=param)
        if not function["strict"]:
            schema = closed_where_silent(schema)
        yield GrammarSpec("strict_schema" if function["strict"] else "json_schema", json.dumps(schema), param)
    if described["text"]:
        yield GrammarSpec(**described["text"])


def _choice(spec: GrammarSpec) -> str:
    choices = _parse_json(spec)
    if not isinstance(choices, list) or not choices:
        raise _invalid(spec, "choices are a list of at least one string")
    for i, text in enumerate(choices):
        if not isinstance(text, str) or not text:
            raise _invalid(spec, f"choice {i} is {'empty' if text == '' else 'not a string'}")
    # one terminal: as rules, many choices are too many items for the parser
    return llguidance.LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices)))


def _grammar(spec: GrammarSpec) -> str:
    try:
        return llguidance.LLMatcher.grammar_from_lark(any_to_lark(spec.text))
    except Exception as error:  # the converter of GBNF raises plain ones too
        raise _invalid(spec, f"is neither Lark (no rule start) nor GBNF: {first_line(str(error))}") from None


_SOURCES: dict[str, Callable[[GrammarSpec], str]] = {
    "json_object": _json_schema,
    "json_schema": _json_schema,
    "strict_schema": _json_schema,
    "regex": lambda spec: llguidance.LLMatcher.grammar_from_regex(spec.text),
    "choice": _choice,
    "grammar": _grammar,
    "tools": _tools,
}


def _parse_json(spec: GrammarSpec) -> Any:
    try:
        return json.loads(spec.text)
    except (ValueError, RecursionError) as error:
        raise _invalid(spec, f"is not JSON: {error}") from None


def _explain(spec: GrammarSpec, error: str) -> str:
    """llguidance's message with the place in the user's own text."""
    if spec.kind in ("json_schema", "strict_schema"):
        schema = _schema(spec)
        until = time.thread_time() + EXPLAIN_SECONDS
        place = _first_invalid(schema, schema, limits_of(spec), until)
        return f"at {place or 'the top'}: {_reason(error)}"
    return _reason(error)


def first_line(error: str) -> str:
    """Of a message of several lines."""
    return error.strip().splitlines()[0] if error.strip() else "unknown error"


def _reason(error: str) -> str:
    """Of a regular expression's message the reason and the place, of any other one the first line."""
    if found := re.search(r"regex parse error:\n    .*\n    ( *)\^+.*\nerror: (.*)", error):
        return f"{found[2]} at character {len(found[1]) + 1} of the expression"
    if found := re.search(r"\(in regex\): (.*)", error):
        return found[1]
    if first_line(error) == NOTHING_FITS:
        return "no text matches it: its rules only lead to one another, or to characters that no token has"
    return re.sub(r"^(?:at )?(\d+)\((\d+)\):", r"line \1, column \2:", first_line(error))


def _first_invalid(schema: dict[str, Any], root: dict[str, Any], limits: Any, until: float, place: str = "") -> str:
    """JSON pointer of the innermost subschema, in order, that does not compile by itself; of an outer one when the
    time is over."""
    shared: dict[str, Any] = {key: root[key] for key in ("$defs", "definitions") if key in root}
    for attempt, (step, child) in enumerate(_subschemas(schema)):
        if attempt == MAX_ATTEMPTS or time.thread_time() > until:
            break
        alone = llguidance.LLMatcher.grammar_from_json_schema(json.dumps({**shared, **child}))
        if llguidance.LLMatcher.validate_grammar_with_warnings(alone, limits=limits)[0]:
            return _first_invalid(child, root, limits, until, place + step)
    return place


def _subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(relative pointer, schema) of the schemas directly inside; definitions first, which others refer to."""
    for key in ("$defs", "definitions", "properties", "patternProperties"):
        if isinstance(children := schema.get(key), dict):
            for name, child in children.items():
                if isinstance(child, dict):
                    yield f"/{key}/{name.replace('~', '~0').replace('/', '~1')}", child
    for key in ("prefixItems", "allOf", "anyOf", "oneOf"):
        if isinstance(listed := schema.get(key), list):
            yield from ((f"/{key}/{i}", child) for i, child in enumerate(listed) if isinstance(child, dict))
    for key in ("items", "additionalProperties"):
        if isinstance(child := schema.get(key), dict):
            yield f"/{key}", child
