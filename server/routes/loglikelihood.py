"""POST /v1/loglikelihood."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.engine.async_engine import AsyncEngine
from server.engine.request import Logprobs
from server.protocol.loglikelihood import (
    Alternative,
    LoglikelihoodRequest,
    LoglikelihoodResponse,
    continuation_fields,
    failed_fields,
    loglikelihood_fields,
    set_fields,
)
from server.routes.body import JsonRoute
from server.routes.described import WITH_ENGINE, responses
from server.routes.prompts import check_model
from server.routes.respond import deadline_of, large_json_response, while_connected
from server.routes.scoring import Scorer
from server.scoring.loglikelihood import Pack, Pair, PairTokenizer, Unscorable, packs
from server.settings import Settings

Scored = tuple[int, Pack | Unscorable, Logprobs, int]
"""Number of a set, a pack of it, its scores, and how many of its tokens came from the prefix cache."""


def loglikelihood_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """The route over one engine."""
    router = APIRouter(tags=["Scoring"], route_class=JsonRoute)

    @router.post(
        "/v1/loglikelihood",
        summary="Log-likelihood of continuations",
        responses=responses(LoglikelihoodResponse, *WITH_ENGINE),
    )
    async def loglikelihood(body: LoglikelihoodRequest, request: Request) -> Response:
        check_model(body.model, settings)
        sets = await asyncio.to_thread(body.alternatives)
        tokenize = PairTokenizer(engine.tokenizer, engine.max_model_len, body.add_bos)
        scorer = Scorer(engine, settings, request.state.request_id)
        score_jobs = _score_jobs(scorer, tokenize, sets)
        scored = scorer.in_order(score_jobs, deadline_of(settings))
        return await while_connected(
            request.receive, _answer(settings.model_name, engine.fingerprint, tokenize.add_bos, len(sets), scored)
        )

    return router


async def _score_jobs(
    scorer: Scorer, tokenize: PairTokenizer, sets: Sequence[Sequence[Alternative]]
) -> AsyncGenerator[Coroutine[Any, Any, Scored]]:
    """The scoring of every set, pack by pack."""

    def read(alternatives: Sequence[Alternative]) -> list[Pack | Unscorable]:
        pairs = tokenize(alternatives)
        unscorable = [pair for pair in pairs if isinstance(pair, Unscorable)]
        return [*unscorable, *packs((pair for pair in pairs if isinstance(pair, Pair)), tokenize.max_tokens)]

    for number, alternatives in enumerate(sets):
        for pack in await asyncio.to_thread(read, alternatives):
            yield _score(scorer, number, pack)


async def _score(scorer: Scorer, number: int, pack: Pack | Unscorable) -> Scored:
    if isinstance(pack, Unscorable):
        return number, pack, Logprobs(), 0
    return number, pack, *await scorer.score(pack.token_ids, pack.branches[0], branches=pack.branches)


async def _answer(
    model: str, fingerprint: str, add_bos: bool, num_sets: int, scored: AsyncGenerator[Scored]
) -> Response:
    entries: list[list[dict[str, Any]]] = [[] for _ in range(num_sets)]
    prompt_tokens = cached_tokens = 0
    first: Unscorable | None = None
    async with aclosing(scored):
        async for number, pack, found, num_cached in scored:
            if isinstance(pack, Unscorable):
                first = first or pack
                entries[number].append(failed_fields(pack.index, pack.error))
                continue
            for pair, scores in pack.scores(found):
                entries[number].append(continuation_fields(pair.index, pair.where, scores, pair.num_bytes))
            prompt_tokens += len(pack.token_ids)
            cached_tokens += num_cached
    if first is not None and not prompt_tokens:
        raise first.error

    def whole() -> dict[str, Any]:
        data = [set_fields(i, sorted(of_set, key=lambda entry: entry["index"])) for i, of_set in enumerate(entries)]
        return loglikelihood_fields(model, fingerprint, add_bos, data, prompt_tokens, cached_tokens)

    return await large_json_response(8 * sum(map(len, entries)), whole)
