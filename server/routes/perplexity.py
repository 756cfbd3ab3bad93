"""POST /v1/perplexity."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lpa_model.perplexity import Convention
from server.engine.async_engine import AsyncEngine
from server.engine.request import Logprobs, Measures
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequest
from server.protocol.inputs import entry_loc
from server.protocol.json_text import WIDE
from server.protocol.perplexity import (
    LINES_OPENAPI,
    PerplexityParameters,
    PerplexityRequest,
    PerplexityResponse,
    input_of_line,
    progress_fields,
)
from server.routes.described import WITH_ENGINE, responses
from server.routes.limits import FEW
from server.routes.ndjson import LineBody, json_or_lines, query_as
from server.routes.prompts import check_model
from server.routes.respond import JsonPieces, deadline_of, in_pieces, json_parts, to_json, while_connected
from server.routes.safetensors import safetensors_stream, wants_safetensors
from server.routes.scoring import Scorer, made_of
from server.routes.stream import Line, line_stream
from server.scoring.perplexity import Corpus, Piece, Text, convention_of, entries, pieces
from server.scoring.units import TextUnits, Units, tokenize_units
from server.settings import Settings

BATCH = 1 << 16  # characters of texts that are tokenized together
MAX_TOKEN_ENTRIES = 1 << 20  # tokens and alternatives returned in one line or answer: about 200 MB of JSON

Inputs = AsyncGenerator[Iterable[tuple[str, str | list[int]]]]
"""Batches of (place in the request, text or token ids); taking one from a batch may raise a UserError."""


def perplexity_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """The route over one engine."""

    async def answer(request: Request, asked: PerplexityParameters, inputs: Inputs, body: LineBody | None) -> Response:
        check_model(asked.model, settings)
        binary = wants_safetensors(request.headers)
        _check_form(asked, binary)
        receive = request.receive if body is None else body.receive
        convention = convention_of(
            engine.tokenizer, engine.max_model_len, asked.method, asked.max_length, asked.stride, asked.add_bos
        )
        tokenizer = engine.tokenizer
        units = None
        if asked.unit is not None:
            units = Units(name=asked.unit, correction=asked.boundary_correction, separator=asked.region_separator)
        with_offsets = asked.return_tokens or units is not None

        def tokenized(given: tuple[str, str | list[int]]) -> Text:
            return tokenize_units(tokenizer, convention, *given, units, with_offsets=with_offsets)

        texts = made_of(inputs, tokenized)
        if binary:
            return safetensors_stream(
                texts, engine, settings, request, convention, asked.top_logprobs, "top_logprobs", receive=receive
            )
        top = tokenizer.vocab_size if asked.top_logprobs == -1 else asked.top_logprobs
        entries = convention.max_length * top if top > FEW else 0
        scorer = Scorer(engine, settings, request.state.request_id, entries=entries)
        measures = Measures(
            top, entropy=asked.return_tokens, mass_of=None if asked.unit is None else tokenizer.word_beginnings
        )
        scored = scorer.in_order(_score_jobs(scorer, texts, convention, asked, measures), deadline_of(settings))
        corpus = Corpus(convention, engine.identity if asked.digest else None)
        lines = _lines(tokenizer, asked, units, corpus, scored, settings.model_name, engine.fingerprint)
        if asked.stream:
            return line_stream(lines, receive)
        return JsonPieces(await while_connected(receive, _whole(lines)))

    async def answer_lines(request: Request) -> Response:
        asked = query_as(PerplexityParameters, request)
        body = LineBody(request.receive, settings.max_body_bytes)
        return await answer(request, asked, _inputs_of_lines(body, settings.max_body_values), body)

    router = APIRouter(tags=["Scoring"], route_class=json_or_lines(answer_lines))

    @router.post(
        "/v1/perplexity",
        summary="Perplexity of texts",
        responses=responses(PerplexityResponse, *WITH_ENGINE),
        openapi_extra=LINES_OPENAPI,
    )
    async def perplexity(body: PerplexityRequest, request: Request) -> Response:
        return await answer(request, body, _inputs_of_list(body.input), None)

    return router


async def _inputs_of_list(inputs: list[str | list[int]]) -> Inputs:
    batch: list[tuple[str, str | list[int]]] = []
    size = 0
    for i, value in enumerate(inputs):
        batch.append((entry_loc("input", i, len(inputs)), value))
        size += len(value)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


async def _inputs_of_lines(body: LineBody, max_values: int) -> Inputs:
    async with aclosing(body.batches()) as batches:
        async for batch in batches:
            yield (
                (where, input_of_line(line, where, max_values))
                for where, line in ((f"line {i}", line) for i, line in batch)
            )


def _check_form(asked: PerplexityParameters, binary: bool) -> None:
    """Raises InvalidRequest that names a field which the answer has no place for."""
    if binary:
        for name in ("return_tokens", "unit", "digest", "stream", "stream_progress"):
            if getattr(asked, name):
                raise InvalidRequest(f"{name}: does not go with a safetensors answer", param=name)
    elif asked.top_logprobs and not asked.return_tokens:
        raise InvalidRequest("top_logprobs: needs return_tokens to be true", param="top_logprobs")


async def _score_jobs(
    scorer: Scorer,
    texts: AsyncGenerator[Text],
    convention: Convention,
    asked: PerplexityParameters,
    measures: Measures,
) -> AsyncGenerator[Coroutine[Any, Any, tuple[Piece, Logprobs]]]:
    """The scoring of every piece of every text, in order."""
    entries = 0
    field = "return_tokens" if asked.return_tokens else "unit"
    async with aclosing(texts):
        async for text in texts:
            if asked.return_tokens or asked.unit is not None:
                more = len(text.token_ids) * (1 + measures.top)
                entries = more + (0 if asked.stream else entries)
                if entries > MAX_TOKEN_ENTRIES:
                    raise InvalidRequest(
                        f"{field}: {entries} tokens and alternatives up to {text.where} are more than "
                        f"{MAX_TOKEN_ENTRIES}, the most in one {'line' if asked.stream else 'answer'}",
                        param=field,
                    )
            for piece in pieces(text, convention, scorer.max_model_len):
                yield _score(scorer, piece, measures)


async def _score(scorer: Scorer, piece: Piece, measures: Measures) -> tuple[Piece, Logprobs]:
    if piece.window is None:
        return piece, Logprobs()
    scores, _ = await scorer.score(*piece.sequence(beyond=measures.mass_of is not None), measures)
    return piece, scores


async def _lines(
    tokenizer: Tokenizer,
    asked: PerplexityParameters,
    units: Units | None,
    corpus: Corpus,
    scored: AsyncGenerator[tuple[Piece, Logprobs]],
    model: str,
    fingerprint: str,
) -> AsyncGenerator[Line]:
    """JSON of each text, then of the corpus."""
    of_text = None if units is None else TextUnits(tokenizer, units)
    tokens: list[list[bytes]] = []  # JSON of the text's tokens, made beside the event loop
    async with aclosing(scored):
        async for piece, scores in scored:
            of_units: list[bytes] = []
            if of_text is not None:
                scores, of_units = await asyncio.to_thread(_unit_entries, of_text, piece, scores)
            if asked.return_tokens and piece.start < piece.end:
                tokens.append(await asyncio.to_thread(_tokens, tokenizer, piece, scores))
            if (tally := corpus.add(piece, scores.logprobs)) is not None:
                line: Line = to_json(corpus.text_fields(tally))
                if asked.return_tokens:
                    line = _with_list(line, "tokens", tokens)
                if of_text is not None:
                    line = _with_list(line, "units", [of_units])
                yield line
                tokens = []
            elif asked.stream_progress:
                yield to_json(progress_fields(corpus.tally.num_texts, piece.end, len(piece.text.token_ids)))
    yield to_json(corpus.fields(model, fingerprint))


def _unit_entries(of_text: TextUnits, piece: Piece, scores: Logprobs) -> tuple[Logprobs, list[bytes]]:
    """A piece's scores without what is beyond its text; and the entries of the text's units, if it is the last."""
    scores, found = of_text.add(piece, scores)
    return scores, in_pieces(part for i, entry in enumerate(found) for part in ("," if i else "", to_json(entry)))


def _tokens(tokenizer: Tokenizer, piece: Piece, scores: Logprobs) -> list[bytes]:
    """The entries of a piece's tokens, with commas between them."""
    levels = int(bool(scores.top_ids) and len(scores.top_ids[0]) > WIDE)
    found = entries(tokenizer, piece, scores)
    return in_pieces(part for i, entry in enumerate(found) for part in ("," if i else "", *json_parts(entry, levels)))


async def _whole(lines: AsyncGenerator[Line]) -> list[bytes]:
    """One JSON object of the lines."""
    async with aclosing(lines):
        *texts, corpus = [line async for line in lines]
    assert isinstance(corpus, str)
    return _with_list(corpus, "data", [[text.encode()] if isinstance(text, str) else text for text in texts])


def _with_list(entry: Line, name: str, items: Iterable[list[bytes]]) -> list[bytes]:
    """A JSON object with one more field, a list of what `items` hold."""
    *first, last = [entry.encode()] if isinstance(entry, str) else entry
    pieces = [*first, last[:-1], f',"{name}":['.encode()]
    for i, item in enumerate(items):
        pieces += [b",", *item] if i else item
    return [*pieces, b"]}"]
