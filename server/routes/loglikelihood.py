"""POST /v1/loglikelihood."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lpa_model.perplexity import adds_bos
from server.engine.async_engine import AsyncEngine
from server.engine.request import Logprobs
from server.errors import ContextLength, InvalidRequest
from server.protocol.inputs import check_token_ids
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
from server.routes.fan_out import deadline_of
from server.routes.prompts import check_model
from server.routes.respond import large_json_response, while_connected
from server.routes.responses import WITH_ENGINE, responses
from server.routes.scoring import Scorer
from server.settings import Settings


@dataclass(frozen=True)
class Pair:
    """A tokenized alternative; it is number `index` of its set."""

    where: str
    index: int
    context: list[int]
    continuation: list[int]
    num_bytes: int  # of the continuation, as it was given


@dataclass(frozen=True)
class Unscorable:
    """An alternative that cannot be scored."""

    index: int
    error: InvalidRequest


@dataclass(frozen=True)
class ScoredPack:
    """Pairs of one set and one context with their log-probabilities and ranks; or what of a set has none."""

    set_number: int
    scores: list[tuple[Pair, Logprobs]]
    num_tokens: int = 0  # the context once
    num_cached_tokens: int = 0
    failed: Sequence[Unscorable] = ()


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
        tokenize = PairTokenizer(engine, body.add_bos)
        scorer = Scorer(engine, settings, request.state.request_id)
        works = _works(scorer, tokenize, sets, engine.max_model_len)
        scored = scorer.in_order(works, deadline_of(settings))
        return await while_connected(
            request.receive, _answer(settings.model_name, engine.fingerprint, tokenize.add_bos, len(sets), scored)
        )

    return router


class PairTokenizer:
    """Tokens of contexts and continuations, split as lm-evaluation-harness does.

    White space at the end of a context goes to its continuation; both are tokenized as one text, which is cut after as
    many tokens as the context has alone. Where one of the two came as token ids, each is taken by itself. Before an
    empty context stands BOS, or EOS where the model has no BOS, unless the continuation begins with it.

    Raises:
        InvalidRequest: add_bos is asked for and the model has no BOS.
    """

    def __init__(self, engine: AsyncEngine, add_bos: bool | None) -> None:
        config = engine.model_config
        self._tokenizer = engine.tokenizer
        self._max_tokens = engine.max_model_len
        self._bos = config.bos_token_id
        self._prefix = engine.tokenizer.eos_token_id if self._bos is None else self._bos
        self.add_bos = adds_bos(engine.tokenizer.backend, self._bos) if add_bos is None else add_bos
        if self.add_bos and self._bos is None:
            raise InvalidRequest("add_bos: the model has no BOS token", param="add_bos")

    def __call__(self, alternatives: Sequence[Alternative]) -> list[Pair | Unscorable]:
        """A set's pairs.

        Raises:
            InvalidRequest: a token id is outside the vocabulary.
        """
        contexts: dict[str, list[int]] = {}
        return [self._pair(i, alternative, contexts) for i, alternative in enumerate(alternatives)]

    def _pair(self, index: int, asked: Alternative, contexts: dict[str, list[int]]) -> Pair | Unscorable:
        where = asked.where
        if not asked.continuation:
            return Unscorable(index, InvalidRequest(f"{where}: is empty; there is nothing to score", param=where))
        if isinstance(asked.context, str) and isinstance(asked.continuation, str):
            bare = asked.context.rstrip()
            if bare not in contexts:
                contexts[bare] = self._ids(bare, where)
            context = contexts[bare]
            continuation = self._ids(asked.context + asked.continuation, where)[len(context) :]
        else:
            context, continuation = self._ids(asked.context, where), self._ids(asked.continuation, where)
        if not context:
            if self._prefix is None:
                reason = f"{where}: its context is empty and the model has no BOS or EOS"
                return Unscorable(index, InvalidRequest(reason, param=where))
            if continuation[:1] == [self._prefix]:
                context, continuation = continuation[:1], continuation[1:]
            else:
                context = [self._prefix]
        elif self.add_bos and self._bos is not None and context[0] != self._bos:
            context = [self._bos, *context]
        if not continuation:
            reason = f"{where}: has no token of its own after its context"
            return Unscorable(index, InvalidRequest(reason, param=where))
        total = len(context) + len(continuation)
        if total > self._max_tokens:
            too_long = ContextLength(f"{where}: has {total} tokens with its context", self._max_tokens, param=where)
            return Unscorable(index, too_long)
        return Pair(where, index, context, continuation, self._num_bytes(asked.continuation))

    def _ids(self, value: str | list[int], where: str) -> list[int]:
        if isinstance(value, str):
            ids = self._tokenizer.encode(value, add_special_tokens=False)
            self._tokenizer.check(ids, where)
            return ids
        check_token_ids(value, self._tokenizer.vocab_size, where)
        return value

    def _num_bytes(self, value: str | list[int]) -> int:
        return (
            len(value.encode()) if isinstance(value, str) else sum(len(self._tokenizer.token_bytes(i)) for i in value)
        )


async def _works(
    scorer: Scorer, tokenize: PairTokenizer, sets: Sequence[Sequence[Alternative]], max_tokens: int
) -> AsyncGenerator[Coroutine[Any, Any, ScoredPack]]:
    """The scoring of every set in packs: continuations of one context, as many as fit behind it together."""
    for number, alternatives in enumerate(sets):
        packs: dict[tuple[int, ...], list[Pair]] = {}
        pairs = await asyncio.to_thread(tokenize, alternatives)
        yield _failures(number, [pair for pair in pairs if isinstance(pair, Unscorable)])
        for pair in pairs:
            if isinstance(pair, Unscorable):
                continue
            pack = packs.setdefault(tuple(pair.context), [])
            room = max_tokens - len(pair.context) - sum(len(other.continuation) for other in pack)
            if len(pair.continuation) > room:
                yield _score_pack(scorer, number, pack.copy())
                pack.clear()
            pack.append(pair)
        for pack in packs.values():
            yield _score_pack(scorer, number, pack)


async def _failures(number: int, failed: Sequence[Unscorable]) -> ScoredPack:
    return ScoredPack(number, [], failed=failed)


async def _score_pack(scorer: Scorer, number: int, pack: Sequence[Pair]) -> ScoredPack:
    """Pairs of one context in one sequence, in which each continuation sees only the context and itself."""
    token_ids, branches = list(pack[0].context), []
    for pair in pack:
        branches.append(len(token_ids))
        token_ids += pair.continuation
    scores, cached = await scorer.score(token_ids, branches[0], branches=tuple(branches))
    found = []
    at = len(pack)  # the first tokens of all continuations come first
    for i, pair in enumerate(pack):
        end = at + len(pair.continuation) - 1
        found.append(
            (
                pair,
                Logprobs(
                    [scores.logprobs[i], *scores.logprobs[at:end]],
                    [scores.ranks[i], *scores.ranks[at:end]],
                ),
            )
        )
        at = end
    return ScoredPack(number, found, len(token_ids), cached)


async def _answer(
    model: str, fingerprint: str, add_bos: bool, num_sets: int, scored: AsyncGenerator[ScoredPack]
) -> Response:
    entries: list[list[dict[str, Any]]] = [[] for _ in range(num_sets)]
    prompt_tokens = cached_tokens = 0
    failed: list[Unscorable] = []
    async with aclosing(scored):
        async for pack in scored:
            for pair, scores in pack.scores:
                entry = continuation_fields(pair.index, pair.where, scores, pair.num_bytes)
                entries[pack.set_number].append(entry)
            entries[pack.set_number] += [failed_fields(lost.index, lost.error) for lost in pack.failed]
            failed += pack.failed
            prompt_tokens += pack.num_tokens
            cached_tokens += pack.num_cached_tokens
    if failed and not prompt_tokens:
        raise failed[0].error

    def whole() -> dict[str, Any]:
        data = [set_fields(i, sorted(of_set, key=lambda entry: entry["index"])) for i, of_set in enumerate(entries)]
        return loglikelihood_fields(model, fingerprint, add_bos, data, prompt_tokens, cached_tokens)

    return await large_json_response(8 * sum(map(len, entries)), whole)
