"""POST /v1/perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lpa_model.perplexity import Window, windows
from server.engine.async_engine import AsyncEngine
from server.engine.request import SamplingParams
from server.errors import ContextLength, EngineError, InvalidRequest
from server.protocol.perplexity import PerplexityRequest, TextScore, perplexity_response
from server.routes.fan_out import Job, deadline_of, run_jobs
from server.routes.prompts import Prompt, check_model, tokenize
from server.routes.respond import json_response, while_connected
from server.settings import Settings


def perplexity_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """The route over one engine."""
    router = APIRouter(tags=["Scoring"])

    @router.post("/v1/perplexity", summary="Perplexity of texts")
    async def perplexity(body: PerplexityRequest, request: Request) -> Response:
        check_model(body.model, settings)
        prompts = await tokenize(engine, "input", body.input)
        cut = [_windows(body, prompt, engine.max_model_len) for prompt in prompts]
        work = _score(engine, request.state.request_id, prompts, cut, deadline_of(settings))
        scores = await while_connected(request.receive, work)
        prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        return json_response(perplexity_response(settings.model_name, scores, prompt_tokens))

    return router


def _windows(body: PerplexityRequest, prompt: Prompt, context: int) -> list[Window]:
    max_length = context if body.max_length is None else body.max_length
    if max_length > context:
        raise InvalidRequest(
            f"max_length: {max_length} is more than the context of {context} tokens", param="max_length"
        )
    if body.method == "full" and body.stride is not None:
        raise InvalidRequest("stride: has no meaning for method 'full'", param="stride")
    stride = max(1, max_length // 2) if body.stride is None else body.stride
    if stride >= max_length:
        raise InvalidRequest(f"stride: {stride} is not below max_length {max_length}", param="stride")
    num_tokens = len(prompt.token_ids)
    if num_tokens < 2:
        raise InvalidRequest(
            f"{prompt.where}: has one token; the first token of a text is not scored, so it must have at least 2",
            param=prompt.where,
        )
    if body.method == "full" and num_tokens > max_length:
        raise ContextLength(
            f"{prompt.where}: {num_tokens} tokens do not fit one window of {max_length}; use method 'sliding'",
            param=prompt.where,
        )
    return windows(num_tokens, body.method, max_length, stride)


async def _score(
    engine: AsyncEngine,
    request_id: str,
    prompts: Sequence[Prompt],
    cut: Sequence[Sequence[Window]],
    deadline: float | None,
) -> list[TextScore]:
    """One score per prompt. Sums are exact to the last bit and do not depend on the order in which windows finish."""
    places = [(i, window) for i, of_text in enumerate(cut) for window in of_text]
    jobs = [
        Job(
            prompts[i].token_ids[window.start : window.end],
            SamplingParams(
                max_tokens=0, prompt_logprobs=0, first_logit_position=window.first_scored - 1 - window.start
            ),
        )
        for i, window in places
    ]
    sums: list[float] = [0.0] * len(jobs)
    async with aclosing(run_jobs(engine, request_id, jobs, deadline)) as outputs:
        async for job, output in outputs:
            assert output.prompt_logprobs is not None
            i, window = places[job]
            logprobs = output.prompt_logprobs.logprobs
            assert len(logprobs) == window.num_scored
            sums[job] = -math.fsum(logprobs)
            if not math.isfinite(sums[job]):
                raise EngineError(f"{prompts[i].where}: the model gave a log-probability that is not a number")
    by_text: list[list[float]] = [[] for _ in prompts]
    for (i, _), nll in zip(places, sums, strict=True):
        by_text[i].append(nll)
    return [
        TextScore(math.fsum(nlls), sum(window.num_scored for window in of_text))
        for nlls, of_text in zip(by_text, cut, strict=True)
    ]
