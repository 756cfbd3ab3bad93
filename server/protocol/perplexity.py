"""POST /v1/perplexity: request fields, and the answer, built as plain dicts for speed."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from json.encoder import encode_basestring
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from lpa_model.perplexity import Convention, Method, Tally
from server.engine.request import Logprobs
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequest
from server.protocol.body import HARMLESS, RequestBody
from server.protocol.inputs import MODEL, Inputs, check_input, lines_openapi, value_of_line
from server.protocol.json_text import WIDE, JsonText, listed
from server.protocol.logprobs import LOWEST_LOGPROB, byte_list
from server.protocol.safetensors import SAFETENSORS
from server.protocol.sampling import FINGERPRINT, MAX_LOGPROBS

UnitName = Literal["word", "region"]


class PerplexityParameters(RequestBody):
    """Everything but the texts: fields of a JSON body, query parameters beside a body of lines."""

    harmless: ClassVar[frozenset[str]] = HARMLESS

    model: str | None = MODEL
    method: Method = Field(
        "full",
        description="full: one window, an error if the text does not fit. sliding: windows of max_length tokens that "
        "begin stride tokens after one another; every token is scored once. rolling: as lm-evaluation-harness; BOS or "
        "EOS first, then disjoint windows with one token of context. chunks: as llama-perplexity; windows that do not "
        "overlap, the second half of each scored.",
    )
    max_length: int | None = Field(
        None, ge=2, description="Tokens of a window, context included (default: the model's context)."
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="Tokens between the beginnings of sliding windows, below max_length (default: half of it).",
    )
    add_bos: bool | None = Field(
        None,
        description="full, sliding: BOS stands before the text, so that its first token is scored too. chunks: it also "
        "replaces the first token of every further window. rolling: always so, with EOS where there is no BOS. "
        "(Default: the tokenizer's own setting.)",
    )
    return_tokens: bool = Field(False, description="Add `tokens`: every token of a text with its log-probability.")
    top_logprobs: int = Field(
        0,
        ge=-1,
        le=MAX_LOGPROBS,
        description="With return_tokens, or in a safetensors file: this many most probable tokens; -1: all.",
    )
    unit: UnitName | None = Field(
        None,
        description="Add `units`: the surprisal of each word (what stands between white space) or region in bits.",
    )
    boundary_correction: bool = Field(
        True,
        description="With unit: the probability of the space before a word belongs to the word before it (Pimentel and "
        "Meister 2024; Oh and Schuler 2024). false: sums of the tokens' surprisals.",
    )
    region_separator: str = Field(
        "|",
        min_length=1,
        max_length=16,
        description="With unit region: what stands between regions in each text; it is taken out before scoring.",
    )
    digest: bool = Field(
        False,
        description="Add `digest`: a short hash of weights, tokenizer, convention, backend and log-probabilities.",
    )
    stream: bool = Field(
        False, description="Answer in lines (application/x-ndjson): one per text as it is done, then the aggregate."
    )
    stream_progress: bool = Field(
        False,
        description="With stream: a line, too, after each window of a text that has further ones: "
        '`{"object": "perplexity.progress", "index": 0, "done_tokens": 512, "prompt_tokens": 7003}`.',
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_progress and not self.stream:
            raise InvalidRequest("stream_progress: needs stream to be true", param="stream_progress")
        if self.unit is None:
            check_without_unit(self.model_fields_set)
        return self


def check_without_unit(given: Container[str]) -> None:
    """Raises InvalidRequest if one of these fields needs a unit."""
    for name in ("boundary_correction", "region_separator"):
        if name in given:
            raise InvalidRequest(f"{name}: has no meaning without unit", param=name)


class PerplexityRequest(PerplexityParameters):
    """How well the model predicts each text, by a stated method."""

    input: Inputs = Field(
        description="A text, a list of texts, a list of token ids or a list of lists.",
        examples=["Once upon a time there was a little robot."],
    )


class Alternative(BaseModel):
    """A token that might have stood in a place."""

    text: str = Field(description=r"`bytes:\xe2` for a token that is no text by itself.")
    id: int
    bytes: list[int]
    logprob: float = Field(description="Natural logarithm.")


class ScoredToken(BaseModel):
    """A token of a text. What is not scored, such as the first token without BOS, has null for all its numbers."""

    text: str = Field(description=r"`bytes:\xe2` for a token that is no text by itself.")
    id: int
    bytes: list[int]
    offset: int = Field(description="Where it begins in the text, in characters (code points).")
    logprob: float | None = Field(description="Natural logarithm.")
    surprisal: float | None = Field(description="Bits: -logprob / ln 2.")
    entropy: float | None = Field(description="Bits, of the distribution over all tokens in this place.")
    rank: int | None = Field(description="1 for the most probable token.")
    top_logprobs: list[Alternative] | None = Field(description="The most probable tokens, best first.")


class ScoredUnit(BaseModel):
    """A word or a region of a text."""

    text: str
    offset: int = Field(description="Where it begins in the text, in characters (code points).")
    num_tokens: int
    surprisal: float | None = Field(description="Bits; null where one of its tokens is not scored.")


class Metrics(BaseModel):
    """What the log-probabilities of a text or a corpus add up to; null is for no number."""

    nll_sum: float = Field(description="Negative log-likelihood in nats: an exact sum, rounded once.")
    num_tokens: int = Field(description="Scored ones.")
    num_words: int = Field(description=r"Of whole texts, len(re.split(r'\s+', text)); of token ids' text likewise.")
    num_bytes: int = Field(description="Of whole texts, in UTF-8.")
    perplexity: float | None = Field(description="exp(nll_sum / num_tokens).")
    perplexity_stderr: float | None = Field(
        description="perplexity · sqrt((mean(x²) - mean(x)²) / (num_tokens - 1)) over the tokens' NLLs x."
    )
    word_perplexity: float | None = Field(description="exp(nll_sum / num_words); null for chunks, as the next two.")
    byte_perplexity: float | None = Field(description="exp(nll_sum / num_bytes).")
    bits_per_byte: float | None = Field(description="nll_sum / num_bytes / ln 2.")
    mean_perplexity: float | None = Field(description="Mean of the texts' perplexities, each text weighing the same.")


class TextMetrics(Metrics):
    """One text."""

    object: Literal["perplexity.text"]
    index: int
    tokens: list[ScoredToken] | None = Field(None, description="With return_tokens.")
    units: list[ScoredUnit] | None = Field(None, description="With unit.")


class CorpusMetrics(Metrics):
    """All texts."""

    num_texts: int


class ScoringUsage(BaseModel):
    """Tokens of the texts, each once, however many windows it is in."""

    prompt_tokens: int
    total_tokens: int


class PerplexityResponse(BaseModel):
    """The answer, with the method and all its parameters; it documents the dicts below and is never built.

    A stream has a line for each entry of `data`, then one with the rest.
    """

    object: Literal["perplexity"]
    model: str
    system_fingerprint: str = FINGERPRINT
    method: Method
    max_length: int
    stride: int | None = Field(description="null but for sliding.")
    add_bos: bool
    prefix_token_id: int | None = Field(description="What stands before a text: BOS, or EOS, or null for nothing.")
    data: list[TextMetrics]
    aggregate: CorpusMetrics
    usage: ScoringUsage
    digest: str | None = Field(None, description="With digest: 16 hexadecimal digits.")


LN2 = math.log(2)
_SAFETENSORS = {
    "type": "string",
    "format": "binary",
    "description": "If the Accept header names it: a file for each text, one after another.",
}
LINES_OPENAPI = lines_openapi(
    "A corpus of any size, read as it comes: each line is a text in JSON, its token ids, or an object with either as "
    '"text" or "input"',
    '{"object":"perplexity.text","index":0}\n{"object":"perplexity"}\n',
    **{SAFETENSORS: {"schema": _SAFETENSORS}},
)


def input_of_line(line: bytes, where: str, max_values: int) -> str | list[int]:
    """The text or token ids of a line of a body; InvalidRequest names the line."""
    value = value_of_line(line, where, max_values)
    if isinstance(value, dict):
        if len(value.keys() & {"text", "input"}) != 1:
            raise InvalidRequest(f'{where}: the object must have either "text" or "input"', param=where)
        value = value["text"] if "text" in value else value["input"]
    return check_input(value, where)


def token_entries(
    tokenizer: Tokenizer, token_ids: Sequence[int], offsets: Sequence[int], scores: Logprobs | None
) -> list[dict[str, Any]]:
    """Entries of `tokens` for a run of tokens; `scores` None: tokens that are not scored, whose numbers are null."""
    entries = []
    for i, (token_id, offset) in enumerate(zip(token_ids, offsets, strict=True)):
        entry = {**_token(tokenizer, token_id), "offset": offset}
        if scores is None:
            entry |= dict.fromkeys(("logprob", "surprisal", "entropy", "rank", "top_logprobs"))
        else:
            entry |= {"logprob": scores.logprobs[i], "surprisal": 0.0 - scores.logprobs[i] / LN2}
            entry |= {"entropy": scores.entropies[i] / LN2, "rank": scores.ranks[i]}
            entry["top_logprobs"] = _alternatives(tokenizer, scores.top_ids[i], scores.top_logprobs[i])
        entries.append(entry)
    return entries


def _alternatives(tokenizer: Tokenizer, ids: list[int], logprobs: list[float]) -> list[dict[str, Any]] | JsonText:
    pairs = partial(zip, ids, logprobs, strict=True)
    if len(ids) <= WIDE:
        return [{**_token(tokenizer, i), "logprob": max(logprob, LOWEST_LOGPROB)} for i, logprob in pairs()]

    def text(place: tuple[int, float]) -> str:
        i, logprob = place
        own = f'"text":{encode_basestring(tokenizer.token_text(i))},"id":{i}'
        return f'{{{own},"bytes":[{byte_list(tokenizer.token_bytes(i))}],"logprob":{max(logprob, LOWEST_LOGPROB)!r}}}'

    def parts() -> Iterator[str]:
        return listed("[", map(text, pairs()), "]")

    return JsonText(parts)


def _token(tokenizer: Tokenizer, token_id: int) -> dict[str, Any]:
    return {
        "text": tokenizer.token_text(token_id),
        "id": token_id,
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def text_fields(index: int, tally: Tally, method: Method) -> dict[str, Any]:
    """An entry of `data`, or a line of a stream, without its tokens."""
    return {"object": "perplexity.text", "index": index, **tally.metrics(method)}


def progress_fields(index: int, done_tokens: int, prompt_tokens: int) -> dict[str, Any]:
    """A line of a stream before a text's entry."""
    return {
        "object": "perplexity.progress",
        "index": index,
        "done_tokens": done_tokens,
        "prompt_tokens": prompt_tokens,
    }


def corpus_fields(
    model: str, fingerprint: str, convention: Convention, corpus: Tally, prompt_tokens: int
) -> dict[str, Any]:
    """The answer without `data`, or the last line of a stream: it says which perplexity it is."""
    return {
        "object": "perplexity",
        "model": model,
        "system_fingerprint": fingerprint,
        **asdict(convention),
        "aggregate": {"num_texts": corpus.num_texts, **corpus.metrics(convention.method)},
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }
