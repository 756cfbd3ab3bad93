"""POST /v1/perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lpa_model.perplexity import Convention, Tally, Window, adds_bos, own_tokens, resolve_convention, windows
from server.engine.async_engine import AsyncEngine
from server.engine.request import SamplingParams
from server.errors import ContextLength, EngineError, InvalidRequest
from server.protocol.perplexity import PerplexityRequest, perplexity_response
from server.routes.body import JsonRoute
from server.routes.fan_out import Job, deadline_of, run_jobs
from server.routes.prompts import Prompt, check_model, tokenize
from server.routes.respond import json_response, while_connected
from server.routes.responses import WITH_ENGINE, responses
from server.settings import Settings


def perplexity_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """The route over one engine."""
    router = APIRouter(tags=["Scoring"], route_class=JsonRoute)

    @router.post("/v1/perplexity", summary="Perplexity of texts", responses=responses(None, *WITH_ENGINE))
    async def perplexity(body: PerplexityRequest, request: Request) -> Response:
        check_model(body.model, settings)
        convention = _convention(body, engine)
        prompts = await tokenize(engine, "input", body.input)
        prompts = [replace(prompt, token_ids=own_tokens(prompt.token_ids, convention)) for prompt in prompts]
        cut = [_windows(prompt, convention) for prompt in prompts]
        work = _score(engine, request.state.request_id, prompts, cut, deadline_of(settings))
        tallies = await while_connected(request.receive, work)
        prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        return json_response(perplexity_response(settings.model_name, tallies, convention, prompt_tokens))

    return router


def _convention(body: PerplexityRequest, engine: AsyncEngine) -> Convention:
    config = engine.model_config
    try:
        return resolve_convention(
            body.method,
            body.max_length,
            body.stride,
            body.add_bos,
            context=engine.max_model_len,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            adds_bos=adds_bos(engine.tokenizer.backend, config.bos_token_id),
        )
    except ValueError as error:
        raise InvalidRequest(str(error), param=str(error).partition(":")[0]) from None


def _windows(prompt: Prompt, convention: Convention) -> list[Window]:
    try:
        cut = list(windows(len(prompt.token_ids), convention))
    except ValueError as error:
        kind = ContextLength if convention.method == "full" else InvalidRequest
        raise kind(f"{prompt.where}: {error}", param=prompt.where) from None
    if not cut:
        raise InvalidRequest(
            f"{prompt.where}: has one token; the first token of a text is not scored, so it must have at least 2",
            param=prompt.where,
        )
    return cut


async def _score(
    engine: AsyncEngine,
    request_id: str,
    prompts: Sequence[Prompt],
    cut: Sequence[Sequence[Window]],
    deadline: float | None,
) -> list[Tally]:
    """One score per prompt. Sums are exact to the last bit and do not depend on the order in which windows finish."""
    places = [(i, window) for i, of_text in enumerate(cut) for window in of_text]
    jobs = [
        Job(
            window.tokens(prompts[i].token_ids),
            SamplingParams(max_tokens=0, prompt_logprobs=0, first_logit_position=window.first_index - 1),
        )
        for i, window in places
    ]
    tallies = [Tally() for _ in prompts]
    async with aclosing(run_jobs(engine, request_id, jobs, deadline)) as outputs:
        async for job, output in outputs:
            assert output.prompt_logprobs is not None
            i, window = places[job]
            assert len(output.prompt_logprobs.logprobs) == window.num_scored
            try:
                tallies[i].add_logprobs(output.prompt_logprobs.logprobs)
            except ValueError as error:
                raise EngineError(f"{prompts[i].where}: {error}") from None
    for prompt, tally in zip(prompts, tallies, strict=True):
        tally.count_text(engine.tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text)
    return tallies
