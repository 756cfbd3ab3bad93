"""POST /v1/perplexity."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from lpa_model.perplexity import Convention, Tally, Window, adds_bos, own_tokens, resolve_convention, windows
from server.engine.async_engine import AsyncEngine
from server.engine.request import Logprobs
from server.engine.tokenizer import Tokenizer
from server.errors import ContextLength, EngineError, InvalidRequest, UserError
from server.protocol.inputs import check_token_ids, place
from server.protocol.logprobs import TextOffsets
from server.protocol.perplexity import (
    LINES_OPENAPI,
    PerplexityParameters,
    PerplexityRequest,
    PerplexityResponse,
    corpus_fields,
    input_of_line,
    progress_fields,
    text_fields,
    token_entries,
)
from server.routes.body import JsonRoute
from server.routes.fan_out import deadline_of
from server.routes.ndjson import LineBody, LineStream, has_lines
from server.routes.prompts import check_model
from server.routes.respond import to_json, while_connected
from server.routes.responses import WITH_ENGINE, responses
from server.routes.scoring import Scorer
from server.settings import Settings

BATCH = 1 << 16  # characters of texts that are tokenized together
MAX_TOKEN_ENTRIES = 1 << 20  # tokens and alternatives returned in one line or answer: about 200 MB of JSON

Inputs = AsyncGenerator[Iterable[tuple[str, str | list[int]]]]
"""Batches of (place in the request, text or token ids); taking one from a batch may raise a UserError."""


@dataclass(frozen=True)
class Text:
    """A text on its way; `text` was decoded if it came as token ids. Token 0 begins at character `start`."""

    where: str
    text: str
    token_ids: list[int]
    start: int
    tally: Tally  # words and bytes are in it from the beginning


@dataclass(frozen=True)
class ScoredWindow:
    """A window of a text with the log-probabilities of its scored tokens; None if the text has nothing to score."""

    text: Text
    window: Window | None
    scores: Logprobs
    is_last: bool  # of its text


def perplexity_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """The route over one engine."""

    async def answer(request: Request, asked: PerplexityParameters, inputs: Inputs, body: LineBody | None) -> Response:
        check_model(asked.model, settings)
        convention = _convention(asked, engine)
        scorer = Scorer(engine, settings, request.state.request_id)
        works = _works(scorer, _texts(engine.tokenizer, convention, inputs), convention, asked)
        scored = scorer.in_order(works, deadline_of(settings))
        lines = _lines(engine.tokenizer, asked, convention, scored, settings.model_name)
        if asked.stream:
            return LineStream(lines, body)
        receive = request.receive if body is None else body.receive
        return Response(await while_connected(receive, _whole(lines)), media_type="application/json")

    async def answer_lines(request: Request) -> Response:
        try:
            asked = PerplexityParameters.model_validate_strings(dict(request.query_params), strict=False)
        except ValidationError as invalid:
            raise RequestValidationError([{**e, "loc": ("query", *e["loc"])} for e in invalid.errors()]) from None
        body = LineBody(request.receive, settings.max_body_bytes)
        return await answer(request, asked, _inputs_of_lines(body, settings.max_body_values), body)

    class JsonOrLines(JsonRoute):
        """FastAPI reads a JSON body whole; one of lines is read as it comes."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer_json = super().get_route_handler()

            async def handle(request: Request) -> Response:
                return await (answer_lines if has_lines(request.url.path, request.headers) else answer_json)(request)

            return handle

    router = APIRouter(tags=["Scoring"], route_class=JsonOrLines)

    @router.post(
        "/v1/perplexity",
        summary="Perplexity of texts",
        responses=responses(PerplexityResponse, *WITH_ENGINE),
        openapi_extra=LINES_OPENAPI,
    )
    async def perplexity(body: PerplexityRequest, request: Request) -> Response:
        return await answer(request, body, _inputs_of_list(body.input), None)

    return router


def _convention(asked: PerplexityParameters, engine: AsyncEngine) -> Convention:
    config = engine.model_config
    try:
        return resolve_convention(
            asked.method,
            asked.max_length,
            asked.stride,
            asked.add_bos,
            context=engine.max_model_len,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            adds_bos=adds_bos(engine.tokenizer.backend, config.bos_token_id),
        )
    except ValueError as error:
        raise InvalidRequest(str(error), param=str(error).partition(":")[0]) from None


async def _inputs_of_list(inputs: list[str | list[int]]) -> Inputs:
    batch: list[tuple[str, str | list[int]]] = []
    size = 0
    for i, value in enumerate(inputs):
        batch.append((place("input", i, len(inputs)), value))
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


async def _texts(tokenizer: Tokenizer, convention: Convention, inputs: Inputs) -> AsyncGenerator[Text]:
    """Tokenized texts in order; tokenized beside the event loop."""

    def tokenize(batch: Iterable[tuple[str, str | list[int]]]) -> list[Text | UserError]:
        found: list[Text | UserError] = []
        try:
            for where, value in batch:
                found.append(_text(tokenizer, convention, where, value))
        except UserError as error:
            found.append(error)
        return found

    async with aclosing(inputs):
        async for batch in inputs:
            for item in await asyncio.to_thread(tokenize, batch):
                if isinstance(item, UserError):
                    raise item
                yield item


def _text(tokenizer: Tokenizer, convention: Convention, where: str, value: str | list[int]) -> Text:
    start = 0
    if isinstance(value, str):
        given = tokenizer.encode(value, add_special_tokens=False)
        tokenizer.check(given, where)
        ids = own_tokens(given, convention)
        text = value
        if len(ids) < len(given):
            start = len(tokenizer.token_text(given[0]))
    else:
        check_token_ids(value, tokenizer.vocab_size, where)
        ids = own_tokens(value, convention)
        text = tokenizer.decode(ids, skip_special_tokens=False)
    tally = Tally()
    tally.count_text(text)
    return Text(where, text, ids, start, tally)


async def _works(
    scorer: Scorer, texts: AsyncGenerator[Text], convention: Convention, asked: PerplexityParameters
) -> AsyncGenerator[Coroutine[Any, Any, ScoredWindow]]:
    """The scoring of every window of every text, in order."""
    entries = 0
    async with aclosing(texts):
        async for text in texts:
            if asked.return_tokens:
                entries = len(text.token_ids) * (1 + asked.top_logprobs) + (0 if asked.stream else entries)
                if entries > MAX_TOKEN_ENTRIES:
                    raise InvalidRequest(
                        f"return_tokens: {entries} tokens and alternatives up to {text.where} are more than "
                        f"{MAX_TOKEN_ENTRIES}, the most in one {'line' if asked.stream else 'answer'}",
                        param="return_tokens",
                    )
            for window, is_last in _with_last(_cut(text, convention)):
                yield _score(scorer, text, window, is_last, asked.top_logprobs)


def _cut(text: Text, convention: Convention) -> Iterator[Window]:
    try:
        return windows(len(text.token_ids), convention)
    except ValueError as error:
        kind = ContextLength if convention.method == "full" else InvalidRequest
        raise kind(f"{text.where}: {error}", param=text.where) from None


def _with_last(cut: Iterator[Window]) -> Iterator[tuple[Window | None, bool]]:
    """Each window and whether it is the last; None for the only one of a text that has none."""
    held = next(cut, None)
    for following in cut:
        yield held, False
        held = following
    yield held, True


async def _score(scorer: Scorer, text: Text, window: Window | None, is_last: bool, top: int) -> ScoredWindow:
    scores = Logprobs()
    if window is not None:
        scores, _ = await scorer.score(window.tokens(text.token_ids), window.first_index, top)
    return ScoredWindow(text, window, scores, is_last)


async def _lines(
    tokenizer: Tokenizer,
    asked: PerplexityParameters,
    convention: Convention,
    scored: AsyncGenerator[ScoredWindow],
    model: str,
) -> AsyncGenerator[str]:
    """JSON of each text, then of the corpus."""
    corpus, prompt_tokens = Tally(), 0
    tokens = _TokenRuns(tokenizer)
    async with aclosing(scored):
        async for item in scored:
            text = item.text
            try:
                text.tally.add_logprobs(item.scores.logprobs)
            except ValueError as error:
                raise EngineError(f"{text.where}: {error}") from None
            if asked.return_tokens and item.window is not None:
                await asyncio.to_thread(tokens.add_window, text, item.window, item.scores)
            if not item.is_last:
                if asked.stream_progress and item.window is not None:
                    yield to_json(progress_fields(corpus.num_texts, item.window.end, len(text.token_ids)))
                continue
            entry = to_json(text_fields(corpus.num_texts, text.tally, convention.method))
            if asked.return_tokens:
                await asyncio.to_thread(tokens.add, text, len(text.token_ids), None)
                entry = _with_list(entry, "tokens", tokens.runs)
            yield entry
            corpus.add_text(text.tally)
            prompt_tokens += len(text.token_ids)
            tokens = _TokenRuns(tokenizer)
    if not corpus.num_tokens:
        why = "" if convention.add_bos else "; without BOS the first token of a text is not scored"
        raise InvalidRequest(f"input: has no token to score{why}", param="input")
    yield to_json(corpus_fields(model, convention, corpus, prompt_tokens))


class _TokenRuns:
    """JSON of a text's tokens, made run by run so that the event loop is never held for long."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.runs: list[str] = []
        self._tokenizer = tokenizer
        self._offsets: TextOffsets | None = None
        self._done = 0

    def add_window(self, text: Text, window: Window, scores: Logprobs) -> None:
        """The tokens up to the end of a window that was scored."""
        self.add(text, window.first_scored, None)
        self.add(text, window.end, scores)

    def add(self, text: Text, end: int, scores: Logprobs | None) -> None:
        """The tokens up to `end`, scored or not."""
        if self._offsets is None:
            self._offsets = TextOffsets(self._tokenizer, text.start, text.text)
        ids = text.token_ids[self._done : end]
        self._done = end
        if ids:
            entries = token_entries(self._tokenizer, ids, self._offsets.take(ids), scores)
            self.runs.append(to_json(entries)[1:-1])


async def _whole(lines: AsyncGenerator[str]) -> str:
    """One JSON object of the lines."""
    async with aclosing(lines):
        *entries, corpus = [line async for line in lines]
    return _with_list(corpus, "data", entries)


def _with_list(entry: str, name: str, items: Iterable[str]) -> str:
    """A JSON object with one more field, a list of what `items` hold."""
    return f'{entry[:-1]},"{name}":[{",".join(items)}]}}'
