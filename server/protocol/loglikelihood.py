"""POST /v1/loglikelihood: request fields, and the answer, built as plain dicts for speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, PlainValidator, model_validator

from server.engine.request import Logprobs
from server.errors import EngineError, InvalidRequest, UserError
from server.protocol.answers import ErrorBody
from server.protocol.body import HARMLESS, RequestBody
from server.protocol.inputs import MODEL, check_input, lines_openapi, value_of_line
from server.protocol.sampling import FINGERPRINT, Usage, usage

TextOrIds = str | list[int]


def _later(schema: Any) -> PlainValidator:
    """A field that `alternatives` checks, which knows its place."""
    return PlainValidator(lambda value: value, json_schema_input_type=schema)


class LoglikelihoodParameters(RequestBody):
    """Everything but the texts: fields of a JSON body, query parameters beside a body of lines."""

    harmless: ClassVar[frozenset[str]] = HARMLESS

    model: str | None = MODEL
    add_bos: bool | None = Field(
        None, description="Whether BOS stands before a context (default: the tokenizer's own setting)."
    )
    stream: bool = Field(
        False, description="Answer in lines (application/x-ndjson): one per set as it is done, then the usage."
    )


class LoglikelihoodRequest(LoglikelihoodParameters):
    """How probable continuations are after their contexts, in one of three forms."""

    context: Annotated[Any, _later(TextOrIds)] = Field(
        None, description="Text or token ids before every one of `continuations`.", examples=["The sun was"]
    )
    continuations: Annotated[Any, _later(list[TextOrIds])] = Field(
        None, description="Texts or token ids, none empty.", examples=[[" bright.", " a table."]]
    )
    pairs: Annotated[Any, _later(list[list[TextOrIds]])] = Field(
        None, description="Instead: alternatives as lists of two, context and continuation."
    )
    sets: Annotated[Any, _later(list[dict[str, TextOrIds | list[TextOrIds]]])] = Field(
        None, description="Instead: many questions at once, objects with `context` and `continuations` each."
    )

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        one_set = self.context is not None or self.continuations is not None
        forms = [one_set, self.pairs is not None, self.sets is not None]
        if sum(forms) != 1:
            raise InvalidRequest("context: give either context and continuations, or pairs, or sets", param="context")
        return self

    def alternatives(self) -> list[list[Alternative]]:
        """The sets, each of alternatives to compare; InvalidRequest names what is no text."""
        if self.pairs is not None:
            return [[alternative_of(pair, f"pairs[{i}]") for i, pair in enumerate(_check_list(self.pairs, "pairs"))]]
        if self.sets is None:
            return [_set({"context": self.context, "continuations": self.continuations}, "")]
        return [_set(entry, f"sets[{i}]") for i, entry in enumerate(_check_list(self.sets, "sets"))]


@dataclass(frozen=True)
class Alternative:
    """A continuation after its context; `where` is its place in the request, for messages."""

    where: str
    context: TextOrIds
    continuation: TextOrIds


def alternative_of(pair: Any, where: str) -> Alternative:
    """Of a list of context and continuation; InvalidRequest names what is wrong."""
    if not isinstance(pair, list) or len(pair) != 2:
        raise InvalidRequest(f"{where}: must be a list of two, context and continuation", param=where)
    context, continuation = (check_input(value, f"{where}[{i}]") for i, value in enumerate(pair))
    return Alternative(f"{where}[1]", context, continuation)


def _set(entry: Any, where: str) -> list[Alternative]:
    if not isinstance(entry, dict):
        raise InvalidRequest(f"{where}: must be an object with context and continuations", param=where)
    context_at, at = (f"{where}.{name}".removeprefix(".") for name in ("context", "continuations"))
    if entry.get("context") is None:
        raise InvalidRequest(f"{context_at}: is required; it may be empty", param=context_at)
    context = check_input(entry["context"], context_at)
    values = enumerate(_check_list(entry.get("continuations"), at))
    return [Alternative(f"{at}[{i}]", context, check_input(value, f"{at}[{i}]")) for i, value in values]


def _check_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{where}: must be a list that is not empty", param=where)
    return value


def set_of_line(line: bytes, where: str, max_values: int) -> list[Alternative]:
    """The set of a line of a body; InvalidRequest names the line."""
    entry = value_of_line(line, where, max_values)
    if isinstance(entry, dict) and (unknown := entry.keys() - {"context", "continuations"}):
        name = f"{where}.{min(unknown)[:64]}"
        raise InvalidRequest(f"{name}: is unknown; a line has context and continuations", param=name)
    return _set(entry, where)


class ScoredContinuation(BaseModel):
    """One alternative. What cannot be scored has an `error`, and null for its numbers; if nothing of a request can, the
    answer is that error."""

    index: int
    logprob: float | None = Field(description="Sum over its tokens, natural logarithm.")
    num_tokens: int | None
    num_bytes: int | None = Field(description="Of the continuation as it was given, in UTF-8.")
    is_greedy: bool | None = Field(description="Whether every token was the most probable one in its place.")
    logprob_per_token: float | None
    logprob_per_byte: float | None = Field(description="null for tokens without text.")
    error: ErrorBody | None = Field(None, description="Why it has no numbers.")


class Best(BaseModel):
    """Index of the best continuation of a set by each number, the first of equals; null where none has it."""

    logprob: int | None
    logprob_per_token: int | None
    logprob_per_byte: int | None


class ScoredSet(BaseModel):
    """Alternatives that were compared."""

    index: int
    continuations: list[ScoredContinuation]
    best: Best


class LoglikelihoodResponse(BaseModel):
    """The answer; it documents the dicts below and is never built.

    A stream has a line for each entry of `data`, with the `object` loglikelihood.set, then one with the rest.
    """

    object: Literal["loglikelihood"]
    model: str
    system_fingerprint: str = FINGERPRINT
    add_bos: bool
    data: list[ScoredSet] = Field(description="One for `continuations` and for `pairs`, else one for each of `sets`.")
    usage: Usage


def continuation_fields(index: int, where: str, scores: Logprobs, num_bytes: int) -> dict[str, Any]:
    """One entry of `continuations`; EngineError if a log-probability is not finite."""
    if not all(map(math.isfinite, scores.logprobs)):
        raise EngineError(f"{where}: the model gave a log-probability that is not a finite number")
    logprob = math.fsum(scores.logprobs)
    return {
        "index": index,
        "logprob": logprob,
        "num_tokens": len(scores.logprobs),
        "num_bytes": num_bytes,
        "is_greedy": all(rank == 1 for rank in scores.ranks),
        "logprob_per_token": logprob / len(scores.logprobs),
        "logprob_per_byte": logprob / num_bytes if num_bytes else None,
    }


LINES_OPENAPI = lines_openapi(
    "Any number of sets, read as they come: each line is a JSON object with `context` and `continuations`",
    '{"object":"loglikelihood.set","index":0}\n{"object":"loglikelihood"}\n',
)

NUMBERS = ("logprob", "num_tokens", "num_bytes", "is_greedy", "logprob_per_token", "logprob_per_byte")


def failed_fields(index: int, error: UserError) -> dict[str, Any]:
    """The entry of a continuation that cannot be scored."""
    return {"index": index, **dict.fromkeys(NUMBERS), **error.body()}


def set_fields(index: int, continuations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An entry of `data`: the continuations, and the index of the best by each number, the first of equals."""
    best: dict[str, int | None] = {}
    for name in ("logprob", "logprob_per_token", "logprob_per_byte"):
        known = [entry for entry in continuations if entry[name] is not None]
        best[name] = max(known, key=lambda entry: entry[name])["index"] if known else None
    return {"index": index, "continuations": list(continuations), "best": best}


def loglikelihood_fields(
    model: str,
    fingerprint: str,
    add_bos: bool,
    prompt_tokens: int,
    cached_tokens: int,
) -> dict[str, Any]:
    """The answer without `data`, or the last line of a stream. A context that continuations share counts once for all
    that were scored together."""
    return {
        "object": "loglikelihood",
        "model": model,
        "system_fingerprint": fingerprint,
        "add_bos": add_bos,
        "usage": usage(prompt_tokens, 0, cached_tokens),
    }
