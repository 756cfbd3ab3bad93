"""Grammars that generated text must match: compiled once with llguidance, followed token by token.

Kinds: any JSON object, a JSON schema, a regular expression of the whole text (Rust's syntax; no look-around), a list
of choices, a grammar in llguidance's Lark dialect or in llama.cpp's GBNF. Between the parts of a JSON text there is
nothing, one space, or a newline and up to 16 spaces; nothing before the first part or after the last, so that a
model cannot go on with white space for ever.

A request whose text is complete and cannot go on ends at once. Where it could both end and go on, the model decides:
the end of the text is allowed as soon as what there is matches. A model without an end-of-text token goes on until
its text cannot, or until its max_tokens.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance.gbnf_to_lark import any_to_lark

from server.engine.json_schema import find_fault
from server.engine.request import GrammarSpec
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequest

MAX_TEXT = 1 << 17  # characters of an expression, grammar or list
MAX_SCHEMA = 1 << 20  # characters of a schema: 5,000 properties with their descriptions
CACHED_GRAMMARS = 128
MAX_ATTEMPTS = 256  # subschemas tried per level, to say where a schema is wrong
SENTINEL = "\x02"  # no token holds it together with other characters
JSON_SPACE = r" |\n {0,16}"
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=100_000,  # about 7 ms of one mask
    step_max_items=400_000,  # about 25 ms of one mask; an object with 5,000 optional properties needs it
    max_items_in_row=25_000,  # five for each of 5,000 optional properties
    max_lexer_states=50_000,  # about 100 MB
    max_grammar_size=100_000,
    verbose_errors=False,
)


class GrammarFailed(InvalidRequest):
    """A grammar that compiled cannot be followed any further."""


class GrammarCompiler:
    """Compiled grammars for one tokenizer, the latest ones cached. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.eos_token_ids = tokenizer.eos_token_ids
        self.mask_size = tokenizer.vocab_size + (tokenizer.eos_token_id is None)
        self._vocabulary: llguidance.LLTokenizer | None = None  # built by the first grammar
        self._cache: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec) -> None:
        """Check a grammar and have it ready; up to a second for a large one, most of it without the GIL.

        Raises:
            InvalidRequest: it cannot be compiled; the message says where and why, `param` is the spec's.
        """
        self._compiled(spec)

    def matcher(self, spec: GrammarSpec) -> llguidance.LLMatcher:
        """A matcher at the beginning of the text. Raises as `compile` does."""
        return self._compiled(spec).deep_copy()

    def _compiled(self, spec: GrammarSpec) -> llguidance.LLMatcher:
        key = (spec.kind, spec.text)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer)
        most = MAX_SCHEMA if spec.kind == "json_schema" else MAX_TEXT
        if len(spec.text) > most:
            raise _invalid(spec, f"has {len(spec.text)} characters; at most {most} can be compiled")
        try:
            source = _SOURCES[spec.kind](spec)
            matcher = llguidance.LLMatcher(self._vocabulary, source, log_level=0, limits=LIMITS)
        except ValueError as error:  # UnicodeEncodeError too
            raise _invalid(spec, f"cannot be compiled: {_first_line(str(error))}") from None
        if not matcher.is_error():
            matcher.compute_bitmask()  # what is too complex fails here, and copies find the first mask's work done
        if matcher.is_error():
            raise _invalid(spec, f"cannot be compiled: {_explain(spec, matcher.get_error())}")
        with self._lock:
            self._cache[key] = matcher
            if len(self._cache) > CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        return matcher


class GrammarState:
    """One request's way through its grammar. `start` computes a mask elsewhere; the rest waits until that is done."""

    def __init__(self, compiler: GrammarCompiler, spec: GrammarSpec) -> None:
        self._compiler = compiler
        self._spec = spec
        self._matcher: llguidance.LLMatcher | None = None
        self._mask = np.zeros(-(-compiler.mask_size // 32) * 4, np.uint8)
        self._job: Future[None] | None = None

    def start(self, pool: Executor) -> Future[None]:
        """Compute which tokens may come next; a job that has not been taken is not started again."""
        if self._job is None:
            self._job = pool.submit(self._fill)
        return self._job

    def _fill(self) -> None:
        if self._matcher is None:
            self._matcher = self._compiler.matcher(self._spec)
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)  # without the GIL
        if self._matcher.is_error():
            raise _failed(self._spec, _failure(self._matcher))

    def take(self) -> npt.NDArray[np.uint8] | None:
        """The mask: a bit per token, lowest first; None if the text is complete and no token may follow.

        Raises:
            GrammarFailed: the grammar is too complex here, or no token of the vocabulary fits it.
            InvalidRequest: as `GrammarCompiler.compile`, if nobody has called that before.
        """
        assert self._job is not None
        job, self._job = self._job, None
        error = job.exception()
        if isinstance(error, InvalidRequest):
            raise error
        if error is not None:  # a defect of llguidance, maybe even a panic
            raise _failed(self._spec, f"{type(error).__name__}: {error}") from error
        if self._compiler.mask_size > self._compiler.vocab_size:  # the end of the text of a model without one
            byte, bit = divmod(self._compiler.vocab_size, 8)
            self._mask[byte] &= 0xFF ^ (1 << bit)
        first, *others = self._compiler.eos_token_ids or (None,)
        if first is not None and self._mask[first // 8] >> first % 8 & 1:  # llguidance knows of one EOS token
            for token_id in others:
                self._mask[token_id // 8] |= 1 << token_id % 8
        return self._mask if self._mask.any() else None

    @property
    def accepts(self) -> bool:
        """Whether the text matches as it is; to be read once its mask has been taken."""
        return self._matcher is not None and bool(self._matcher.is_accepting())

    def advance(self, token_id: int) -> bool:
        """Follow a token that the last mask allowed; whether the text is complete and cannot go on.

        Raises:
            GrammarFailed: the grammar is too complex here.
        """
        assert self._matcher is not None
        if token_id in self._compiler.eos_token_ids:
            return True
        if not self._matcher.consume_token(token_id):
            raise _failed(self._spec, _failure(self._matcher))
        return self._matcher.is_stopped()


class _Vocabulary:
    """What llguidance reads of a tokenizer: the bytes of every token, which are special, and how text that is
    forced would be tokenized.

    A model without an end-of-text token gets one after its last token; `GrammarState.take` removes it.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < tokenizer.vocab_size)
        self.eos_token_id = tokenizer.vocab_size if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        if tokenizer.eos_token_id is None:
            self.tokens.append(b"<|end of text|>")
        if self.eos_token_id not in self.special_token_ids:
            self.special_token_ids.append(self.eos_token_id)
        self._special = frozenset(self.special_token_ids)

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text in the middle of another: a tokenizer may put a space before the first character of all."""
        ids = self._tokenizer.encode(SENTINEL + text, add_special_tokens=False)
        if max(ids, default=0) >= self._tokenizer.vocab_size:  # a token that the model lacks
            return self._longest_first(text.encode())
        while ids and not self.tokens[ids[0]].endswith(SENTINEL.encode()):
            ids = ids[1:]
        ids = ids[1:]
        # the text of a special token is text here: the token itself fits no grammar
        if self._special.isdisjoint(ids) and b"".join(self.tokens[i] for i in ids) == text.encode():
            return ids
        return self._longest_first(text.encode())

    def _longest_first(self, raw: bytes) -> list[int]:
        """Tokens by their bytes alone, up to a byte that none begins with: for a tokenizer that rewrites text."""
        by_bytes = {token: i for i, token in enumerate(self.tokens) if token and i not in self.special_token_ids}
        longest = max(map(len, by_bytes))
        ids = []
        while raw:
            length = next((n for n in range(min(longest, len(raw)), 0, -1) if raw[:n] in by_bytes), 0)
            if not length:
                break
            ids.append(by_bytes[raw[:length]])
            raw = raw[length:]
        return ids


def _vocabulary(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer)))


def _invalid(spec: GrammarSpec, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{spec.param}: {reason}", param=spec.param)


def _failed(spec: GrammarSpec, reason: str) -> GrammarFailed:
    return GrammarFailed(f"{spec.param}: {reason}", param=spec.param)


def _json_schema(spec: GrammarSpec) -> str:
    schema = _parse_json(spec)
    if not isinstance(schema, dict | bool):
        raise _invalid(spec, "a JSON schema is an object or a boolean")
    if fault := find_fault(schema):
        raise _invalid(spec, f"cannot be compiled: {fault}")
    return _schema_source(schema)


def _schema_source(schema: dict[str, Any] | bool) -> str:
    text = json.dumps(schema)
    return llguidance.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": JSON_SPACE})


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
        raise _invalid(spec, f"is neither Lark (no rule start) nor GBNF: {_first_line(str(error))}") from None


_SOURCES: dict[str, Callable[[GrammarSpec], str]] = {
    "json_object": lambda spec: _schema_source({"type": "object"}),
    "json_schema": _json_schema,
    "regex": lambda spec: llguidance.LLMatcher.grammar_from_regex(spec.text),
    "choice": _choice,
    "grammar": _grammar,
}


def _parse_json(spec: GrammarSpec) -> Any:
    try:
        return json.loads(spec.text)
    except (ValueError, RecursionError) as error:
        raise _invalid(spec, f"is not JSON: {error}") from None


def _explain(spec: GrammarSpec, error: str) -> str:
    """llguidance's message with the place in the user's own text."""
    if spec.kind == "json_schema":
        schema = json.loads(spec.text)
        place = _first_invalid(schema, schema) if isinstance(schema, dict) else ""
        return f"at {place or 'the top'}: {_reason(error)}"
    return _reason(error)


def _failure(matcher: llguidance.LLMatcher) -> str:
    reason = _first_line(matcher.get_error())
    return "no token of the vocabulary fits the grammar here" if reason == "NoExtensionBias" else reason


def _first_line(error: str) -> str:
    return error.strip().splitlines()[0] if error.strip() else "unknown error"


def _reason(error: str) -> str:
    """Of a regular expression's message the reason and the place, of any other one the first line."""
    if found := re.search(r"regex parse error:\n    .*\n    ( *)\^+.*\nerror: (.*)", error):
        return f"{found[2]} at character {len(found[1]) + 1} of the expression"
    if found := re.search(r"\(in regex\): (.*)", error):
        return found[1]
    if _first_line(error) == "NoExtensionBias":
        return "no text matches it: its rules only lead to one another, or to characters that no token has"
    return re.sub(r"^(?:at )?(\d+)\((\d+)\):", r"line \1, column \2:", _first_line(error))


def _first_invalid(schema: dict[str, Any], root: dict[str, Any], place: str = "") -> str:
    """JSON pointer of the innermost subschema, in order, that does not compile by itself."""
    shared: dict[str, Any] = {key: root[key] for key in ("$defs", "definitions") if key in root}
    for attempt, (step, child) in enumerate(_subschemas(schema)):
        if attempt == MAX_ATTEMPTS:
            break
        alone = _schema_source({**shared, **child})
        if llguidance.LLMatcher.validate_grammar_with_warnings(alone, limits=LIMITS)[0]:
            return _first_invalid(child, root, place + step)
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
