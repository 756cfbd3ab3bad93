"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.engine.async_engine import AsyncEngine
from server.engine.request import Logprobs, RequestOutput, SamplingParams
from server.errors import ContextLength, InvalidRequest
from server.protocol.completions import CompletionRequest, choice, completion_head, usage
from server.protocol.logprobs import Columns, TextOffsets, columns, join, prompt_columns
from server.routes.fan_out import Job, deadline_of, run_jobs
from server.routes.prompts import Prompt, check_model, tokenize
from server.routes.respond import json_response, to_json, while_connected
from server.routes.sse import DONE, EventStream
from server.settings import Settings


def completions_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """The route over one engine."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions", summary="Continue a text")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model, settings)
        call = await _accept(engine, settings, body, request.state.request_id)
        if not body.stream:
            return json_response(await while_connected(request.receive, _answer(call)))
        events = _events(call)
        # the first event shows that the engine took the request, so that a refusal still has its status
        first = await while_connected(request.receive, anext(events))
        return EventStream(_chain(first, events))

    return router


@dataclass
class _Call:
    """A checked request on its way; choice c of prompt p has index p · n + c."""

    engine: AsyncEngine
    body: CompletionRequest
    prompts: list[Prompt]
    request_id: str
    deadline: float | None  # on the event loop's clock
    head: dict[str, Any]
    prompt_texts: list[str]  # as echo shows them
    prompt_scores: dict[int, Logprobs] = field(default_factory=dict)  # by prompt
    columns_of_prompts: dict[int, Columns] = field(default_factory=dict)  # n choices share them
    cached_tokens: dict[int, int] = field(default_factory=dict)  # by prompt
    completion_tokens: int = 0

    @property
    def scores_prompts(self) -> bool:
        return self.body.echo and self.body.logprobs is not None

    @property
    def scores_prompts_first(self) -> bool:
        """Whether the prompts are scored on their own before anything is generated: when nothing will be, when a
        stream must begin with them, and when n completions would share them."""
        return self.scores_prompts and (self.body.stream or self.body.n > 1 or self.body.max_tokens == 0)

    def observe(self, prompt: int, output: RequestOutput) -> None:
        """Count the output's tokens, and keep what it says of its prompt."""
        self.completion_tokens += len(output.token_ids)
        self.cached_tokens.setdefault(prompt, output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            self.prompt_scores[prompt] = output.prompt_logprobs

    def prompt_columns(self, prompt: int) -> Columns:
        if prompt not in self.columns_of_prompts:
            scores = self.prompt_scores.get(prompt, Logprobs())
            ids, text = self.prompts[prompt].token_ids, self.prompt_texts[prompt]
            self.columns_of_prompts[prompt] = prompt_columns(self.engine.tokenizer, ids, text, scores)
        return self.columns_of_prompts[prompt]

    def offsets(self, prompt: int) -> TextOffsets:
        return TextOffsets(self.engine.tokenizer, start=len(self.prompt_texts[prompt]))

    def usage(self) -> dict[str, Any]:
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        return usage(prompt_tokens, self.completion_tokens, sum(self.cached_tokens.values()))


async def _accept(engine: AsyncEngine, settings: Settings, body: CompletionRequest, request_id: str) -> _Call:
    """Tokenize the prompts and refuse what the model cannot do."""
    prompts = await tokenize(engine, "prompt", body.prompt)
    for prompt in prompts:
        total = len(prompt.token_ids) + body.max_tokens
        if total > engine.max_model_len:
            raise ContextLength(
                f"{prompt.where}: {len(prompt.token_ids)} tokens and max_tokens {body.max_tokens} make {total}; "
                f"the maximum context length is {engine.max_model_len} tokens",
                param=prompt.where if len(prompt.token_ids) > engine.max_model_len else "max_tokens",
            )
    vocab = engine.tokenizer.vocab_size
    if wrong := [token for token in body.stop_token_ids if not 0 <= token < vocab]:
        raise InvalidRequest(f"stop_token_ids: {wrong[0]} is outside the vocabulary of {vocab}", param="stop_token_ids")
    return _Call(
        engine=engine,
        body=body,
        prompts=prompts,
        request_id=request_id,
        deadline=deadline_of(settings),
        head=completion_head(request_id, int(time.time()), settings.model_name),
        prompt_texts=[_text(engine, prompt) if _needs_text(body) else "" for prompt in prompts],
    )


def _needs_text(body: CompletionRequest) -> bool:
    return body.echo or body.logprobs is not None  # offsets count from the beginning of the prompt


def _text(engine: AsyncEngine, prompt: Prompt) -> str:
    return engine.tokenizer.decode(prompt.token_ids, skip_special_tokens=False) if prompt.text is None else prompt.text


async def _score_prompts(call: _Call) -> None:
    """Fill `prompt_scores`; a single token has nothing that predicts it."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=call.body.logprobs)
    scored = [i for i, prompt in enumerate(call.prompts) if len(prompt.token_ids) > 1]
    jobs = [Job(call.prompts[i].token_ids, params) for i in scored]
    async with aclosing(run_jobs(call.engine, f"{call.request_id}-prompt", jobs, call.deadline)) as outputs:
        async for job, output in outputs:
            call.observe(scored[job], output)


def _generate(call: _Call) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """(index, output) of every completion."""
    plain = call.body.to_sampling_params()
    with_prompt = plain
    if call.scores_prompts and not call.scores_prompts_first:
        with_prompt = call.body.to_sampling_params(prompt_logprobs=call.body.logprobs)
    jobs = [
        Job(prompt.token_ids, plain if c else with_prompt, choice=c)
        for prompt in call.prompts
        for c in range(call.body.n)
    ]
    return run_jobs(call.engine, call.request_id, jobs, call.deadline)


@dataclass
class _Completion:
    """What has been generated for one index."""

    offsets: TextOffsets
    text: list[str] = field(default_factory=list)
    parts: list[Columns] = field(default_factory=list)
    finish_reason: str = "length"
    stop_reason: int | str | None = None


async def _answer(call: _Call) -> dict[str, Any]:
    """The whole answer."""
    body = call.body
    if call.scores_prompts_first:
        await _score_prompts(call)
    indices = range(len(call.prompts) * body.n)
    done = [_Completion(call.offsets(index // body.n)) for index in indices]
    if body.max_tokens:
        async with aclosing(_generate(call)) as outputs:
            async for index, output in outputs:
                call.observe(index // body.n, output)
                completion = done[index]
                completion.text.append(output.text)
                if output.logprobs is not None:
                    completion.parts.append(_columns(call, output, completion.offsets))
                if output.finish_reason is not None:
                    completion.finish_reason = output.finish_reason.value
                    completion.stop_reason = output.stop_reason
    choices = []
    for index, completion in enumerate(done):
        prompt = index // body.n
        text = (call.prompt_texts[prompt] if body.echo else "") + "".join(completion.text)
        parts = ([call.prompt_columns(prompt)] if call.scores_prompts else []) + completion.parts
        logprobs = join(parts) if body.logprobs is not None else None
        choices.append(choice(index, text, logprobs, completion.finish_reason, completion.stop_reason))
    return {**call.head, "choices": choices, "usage": call.usage()}


def _columns(call: _Call, output: RequestOutput, offsets: TextOffsets) -> Columns:
    assert output.logprobs is not None
    return columns(call.engine.tokenizer, output.token_ids, output.logprobs, offsets.take(output.token_ids))


async def _events(call: _Call) -> AsyncGenerator[str]:
    """The answer as events: the prompt first if it is echoed, a chunk per output, the usage if asked for, [DONE]."""
    body = call.body
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    tail: dict[str, Any] = {"usage": None} if with_usage else {}

    def chunk(entry: dict[str, Any]) -> str:
        return to_json({**call.head, "choices": [entry], **tail})

    def echo(index: int, finish_reason: str | None) -> str:
        prompt = index // body.n
        logprobs = call.prompt_columns(prompt) if call.scores_prompts else None
        return chunk(choice(index, call.prompt_texts[prompt], logprobs, finish_reason, None))

    if call.scores_prompts_first:
        await _score_prompts(call)
    indices = range(len(call.prompts) * body.n)
    if body.max_tokens == 0:
        for index in indices:
            yield echo(index, "length")
    else:
        offsets = [call.offsets(index // body.n) for index in indices]
        to_echo = set(indices) if body.echo else set()
        async with aclosing(_generate(call)) as outputs:
            async for index, output in outputs:
                call.observe(index // body.n, output)
                if index in to_echo:
                    to_echo.remove(index)
                    yield echo(index, None)
                logprobs = None if output.logprobs is None else _columns(call, output, offsets[index])
                if output.text or logprobs or output.finish_reason:
                    yield chunk(choice(index, output.text, logprobs, output.finish_reason, output.stop_reason))
    if with_usage:
        yield to_json({**call.head, "choices": [], "usage": call.usage()})
    yield DONE


async def _chain(first: str, rest: AsyncGenerator[str]) -> AsyncGenerator[str]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event
