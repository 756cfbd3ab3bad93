"""Thousands of schemas, expressions and grammars as strangers may send them: each is compiled or refused, and the
server lives on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lpa_model.config import Architecture
from server.engine.grammar_workers import GrammarWorkers
from server.engine.request import GrammarSpec
from server.engine.vocabulary import Vocabulary
from server.errors import InvalidRequest
from tests.serving import Served, serving
from tests.tiny import byte_tokenizer

EXAMPLES = 1500
EDGES = [0, 1, -1, 2**31, 2**53, 2**63 - 1, -(2**63), -(2**63) + 1, 2**64, 10**40, -(10**40), 1e308, 5e-324, 0.1, -0.0]
NAMES = st.text(st.sampled_from("ab-_ é/~\U0001f469\u2028"), max_size=3)
NUMBERS = st.sampled_from(EDGES) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(-2, 12) | st.sampled_from(EDGES)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=4,
)
PATTERNS = st.sampled_from(["^a+$", "b|(c", r"\d{3}", "[", "^.{0,5}$", r"\p{L}", "(?i)a", "a{9999}"])


def schemas() -> st.SearchStrategy[Any]:
    """JSON schemas, most of them sound, with numbers at the edges of what computers count with."""
    return st.recursive(st.booleans() | _keywords({}), lambda inner: _keywords(_nested(inner)), max_leaves=8)


def _keywords(more: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    plain = {
        "type": st.sampled_from(["object", "array", "string", "integer", "number", "boolean", "null", "any"]),
        "const": VALUES,
        "enum": st.lists(VALUES, max_size=4),
        **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "multipleOf"), NUMBERS),
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "maxProperties"), COUNTS),
        "pattern": PATTERNS,
        "format": st.sampled_from(["date", "time", "email", "uuid", "ipv4", "uri", "x"]),
        "required": st.lists(NAMES, max_size=3),
        "additionalProperties": st.booleans(),
        "$ref": st.sampled_from(["#", "#/properties/a", "#/$defs/x", "http://example.org/x"]),
    }
    keywords = {**plain, **more}
    some = st.lists(st.sampled_from(sorted(keywords)), max_size=3, unique=True)
    return some.flatmap(lambda names: st.fixed_dictionaries({name: keywords[name] for name in names}))


def _nested(inner: st.SearchStrategy[Any]) -> dict[str, st.SearchStrategy[Any]]:
    return {
        **dict.fromkeys(("properties", "$defs"), st.dictionaries(NAMES, inner, max_size=3)),
        "patternProperties": st.dictionaries(PATTERNS, inner, max_size=2),
        **dict.fromkeys(("items", "additionalProperties", "not"), inner),
        **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), st.lists(inner, min_size=1, max_size=3)),
    }


REGEXES = [r"[a-z]{3,8}", r"(a|b)*a(a|b){9}", r"\d{4}-\d\d", r"(?i)abc|\p{L}+", r"[^\x00-\x7f]*", r"a?b+c{2,}(?:d|e)*"]
GRAMMARS = [
    'start: "(" item ("," item)? ")"\nitem: /[0-9]{1,2}/ | "x" | "(" item ")"',
    'root ::= "yes" | "no" ", " reason\nreason ::= [a-c]{1,4}',
    'start: s\ns: s s s | s s | "a" | "b" |',
    'start: A B?\nA: /a+/ & ~/aaa/\nB: "b"~1..4',
    'start: %json { "type": "integer" } | <|endoftext|> | start start',
]
PIECES = [
    *"(){}[]|*+?.\\^$&~\"'/:,<>%#\n 09azé\u2028",
    *("{9999}", "{1,1000}", "(?", "\\p{", "\\u", "start", "::=", "..", "-9223372036854775808"),
]


def mutated(text: str, rng: random.Random) -> str:
    """A text with some pieces put in, taken out, doubled or exchanged."""
    for _ in range(rng.randrange(1, 6)):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        piece = rng.choice([*PIECES, text[at:to], text[at:to] * rng.randrange(2, 9)])
        text = text[:at] + piece + text[to if rng.random() < 0.5 else at :]
        text = text[:2000]
    return text


@pytest.fixture(scope="module")
def workers() -> Iterator[GrammarWorkers]:
    tokens = [b"<|endoftext|>", *(bytes([byte]) for byte in range(256))]
    workers = GrammarWorkers(Vocabulary(byte_tokenizer(), tokens, [0], 0), patience=600)  # a busy machine ends nothing
    yield workers
    workers.close()


def compiled_or_refused(workers: GrammarWorkers, kind: Any, text: str) -> bool:
    """Whether it was compiled; anything but that and a refusal that names its field is an error."""
    try:
        assert workers.try_out(GrammarSpec(kind, text, "field"))[0]
    except InvalidRequest as refusal:
        assert refusal.message.startswith("field: ") and "\n" not in refusal.message
        return False
    return True


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(schema=schemas())
def test_any_schema(workers: GrammarWorkers, schema: Any) -> None:
    compiled_or_refused(workers, "json_schema", json.dumps(schema))


@pytest.mark.parametrize(("kind", "seeds"), [("regex", REGEXES), ("grammar", GRAMMARS)])
def test_mutated_expressions_and_grammars(workers: GrammarWorkers, kind: str, seeds: list[str]) -> None:
    rng = random.Random(2)
    texts = [mutated(rng.choice(seeds), rng) for _ in range(EXAMPLES)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda text: compiled_or_refused(workers, kind, text), texts))
    assert 0 < sum(found) < EXAMPLES  # the mutations are neither all harmless nor all wrong


def test_the_server_is_alive_at_the_end(tiny_checkpoints: dict[Architecture, Path]) -> None:
    def ask(served: Served, form: dict[str, Any]) -> int:
        body = {"prompt": "a", "max_tokens": 12, "structured_outputs": form}
        return served.post("/v1/completions", **body).status_code

    rng = random.Random(3)
    with serving(tiny_checkpoints["setting2"]) as served:
        statuses = {ask(served, {"json": {"const": edge}}) for edge in EDGES}
        for _ in range(EXAMPLES // 5):
            statuses.add(ask(served, {"regex": mutated(rng.choice(REGEXES), rng) or "a"}))
            statuses.add(ask(served, {"grammar": mutated(rng.choice(GRAMMARS), rng) or "a"}))
        assert {200, 400} <= statuses <= {200, 400, 500}  # 500: a grammar that no token of this vocabulary can follow
        assert served.client.get("/health").status_code == 200
        assert ask(served, {"regex": "[a-c]{3}"}) == 200
