"""POST /v1/loglikelihood."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.engine.async_engine import AsyncEngine
from server.engine.request import Logprobs
from server.protocol.loglikelihood import (
    LINES_OPENAPI,
    Alternative,
    LoglikelihoodParameters,
    LoglikelihoodRequest,
    LoglikelihoodResponse,
    continuation_fields,
    failed_fields,
    loglikelihood_fields,
    set_fields,
    set_of_line,
)
from server.routes.described import WITH_ENGINE, responses
from server.routes.ndjson import LineBody, json_or_lines, query_as
from server.routes.prompts import check_model
from server.routes.respond import deadline_of, large_json, large_json_response, to_json, while_connected
from server.routes.scoring import Scorer, made_of
from server.routes.stream import Line, line_stream
from server.scoring.loglikelihood import Pack, Pair, PairTokenizer, Unscorable, packs
from server.settings import Settings

BATCH = 64  # sets that are tokenized together, beside the event loop

Sets = AsyncGenerator[Iterable[Sequence[Alternative]]]
"""Batches of sets; taking one from a batch may raise a UserError."""

Scored = tuple[Pack | Unscorable, Logprobs, int, bool]
"""A pack of a set, its scores, how many of its tokens came from the prefix cache, and whether it is the set's last."""


def loglikelihood_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """The route over one engine."""

    async def answer(request: Request, asked: LoglikelihoodParameters, sets: Sets, body: LineBody | None) -> Response:
        check_model(asked.model, settings)
        receive = request.receive if body is None else body.receive
        tokenize = PairTokenizer(engine.tokenizer, engine.max_model_len, asked.add_bos)
        scorer = Scorer(engine, settings, request.state.request_id)
        scored = made_of(sets, partial(_packs, tokenize))
        found = _Found(scorer.in_order(_score_jobs(scorer, scored), deadline_of(settings)))

        def rest() -> dict[str, Any]:
            numbers = (found.prompt_tokens, found.cached_tokens)
            return loglikelihood_fields(settings.model_name, engine.fingerprint, tokenize.add_bos, *numbers)

        async def lines() -> AsyncGenerator[Line]:
            async with aclosing(found.sets()) as sets:
                async for of_set in sets:
                    yield await large_json(8 * of_set.count, of_set.line)
            yield to_json(rest())

        async def whole() -> Response:
            async with aclosing(found.sets()) as sets:
                data = [of_set async for of_set in sets]
            if found.first is not None and not found.prompt_tokens:
                raise found.first.error
            size = 8 * sum(of_set.count for of_set in data)
            return await large_json_response(size, lambda: {**rest(), "data": [of_set.fields() for of_set in data]})

        return line_stream(lines(), receive) if asked.stream else await while_connected(receive, whole())

    async def answer_lines(request: Request) -> Response:
        asked = query_as(LoglikelihoodParameters, request)
        body = LineBody(request.receive, settings.max_body_bytes)
        return await answer(request, asked, _sets_of_lines(body, settings.max_body_values), body)

    router = APIRouter(tags=["Scoring"], route_class=json_or_lines(answer_lines))

    @router.post(
        "/v1/loglikelihood",
        summary="Log-likelihood of continuations",
        responses=responses(LoglikelihoodResponse, *WITH_ENGINE),
        openapi_extra=LINES_OPENAPI,
    )
    async def loglikelihood(body: LoglikelihoodRequest, request: Request) -> Response:
        return await answer(request, body, _sets_of_body(await asyncio.to_thread(body.alternatives)), None)

    return router


async def _sets_of_body(sets: Sequence[Sequence[Alternative]]) -> Sets:
    for start in range(0, len(sets), BATCH):
        yield sets[start : start + BATCH]


async def _sets_of_lines(body: LineBody, max_values: int) -> Sets:
    async with aclosing(body.batches()) as batches:
        async for batch in batches:
            remaining = iter(batch)
            while some := list(islice(remaining, BATCH)):
                yield (set_of_line(line, f"line {i}", max_values) for i, line in some)


def _packs(tokenize: PairTokenizer, alternatives: Sequence[Alternative]) -> list[Pack | Unscorable]:
    """What is scored of a set."""
    pairs = tokenize(alternatives)
    unscorable = [pair for pair in pairs if isinstance(pair, Unscorable)]
    return [*unscorable, *packs((pair for pair in pairs if isinstance(pair, Pair)), tokenize.max_tokens)]


async def _score_jobs(
    scorer: Scorer, sets: AsyncGenerator[list[Pack | Unscorable]]
) -> AsyncGenerator[Coroutine[Any, Any, Scored]]:
    """The scoring of every set, pack by pack."""
    async with aclosing(sets):
        async for of_set in sets:
            for i, pack in enumerate(of_set, 1):
                yield _score(scorer, pack, i == len(of_set))


async def _score(scorer: Scorer, pack: Pack | Unscorable, is_last: bool) -> Scored:
    if isinstance(pack, Unscorable):
        return pack, Logprobs(), 0, is_last
    return pack, *await scorer.score(pack.token_ids, pack.branches[0], branches=pack.branches), is_last


@dataclass
class _Set:
    """A set that was scored. Its entry is made where the answer is written: it may have very many continuations."""

    index: int
    scored: list[tuple[Pack | Unscorable, Logprobs]] = field(default_factory=list)
    count: int = 0  # continuations

    def fields(self) -> dict[str, Any]:
        """Its entry of `data`. Raises EngineError for a log-probability that is not finite."""
        entries = []
        for pack, found in self.scored:
            if isinstance(pack, Unscorable):
                entries.append(failed_fields(pack.index, pack.error))
                continue
            for pair, scores in pack.scores(found):
                entries.append(continuation_fields(pair.index, pair.where, scores, pair.num_bytes))
        return set_fields(self.index, sorted(entries, key=itemgetter("index")))

    def line(self) -> dict[str, Any]:
        """Its line of a stream. Raises as `fields`."""
        return {"object": "loglikelihood.set", **self.fields()}


@dataclass
class _Found:
    """What was scored so far."""

    scored: AsyncGenerator[Scored]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first: Unscorable | None = None  # the first that could not be scored

    async def sets(self) -> AsyncGenerator[_Set]:
        """Each set as soon as it is complete."""
        of_set = _Set(0)
        async with aclosing(self.scored) as scored:
            async for pack, found, num_cached, is_last in scored:
                of_set.scored.append((pack, found))
                if isinstance(pack, Unscorable):
                    self.first = self.first or pack
                    of_set.count += 1
                else:
                    self.prompt_tokens += len(pack.token_ids)
                    self.cached_tokens += num_cached
                    of_set.count += len(pack.pairs)
                if is_last:
                    yield of_set
                    of_set = _Set(of_set.index + 1)
