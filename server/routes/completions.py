"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lpa_model.perplexity import Convention, Tally
from server.engine.async_engine import AsyncEngine
from server.engine.detokenizer import unfinished_bytes
from server.engine.request import Completion, Logprobs, RequestOutput
from server.errors import InvalidRequest
from server.protocol.completions import CompletionRequest, CompletionResponse, completion_choice, completion_envelope
from server.protocol.logprobs import (
    Columns,
    Name,
    TextOffsets,
    columns,
    join,
    namer,
    offsets_of_ids,
    prompt_columns,
    prompt_logprobs,
)
from server.routes.body import JsonRoute
from server.routes.described import WITH_ENGINE, responses
from server.routes.generation import Generation, begin
from server.routes.limits import check_sampling, check_sequences
from server.routes.prompts import check_model, start_of_document, tokenize, truncate
from server.routes.respond import TEXT, large_json, large_json_response, to_json, while_connected, with_text
from server.routes.safetensors import safetensors_stream, wants_safetensors
from server.routes.stream import DONE, Line, event_stream
from server.routes.waiting import with_comments
from server.scoring.perplexity import Text
from server.settings import Settings


def completions_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """The route over one engine."""
    router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)

    @router.post(
        "/v1/completions",
        summary="Continue a text",
        responses=responses(CompletionResponse, *WITH_ENGINE, streams=True),
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model, settings)
        if wants_safetensors(request.headers):
            return await _files(engine, settings, body, request)
        call = await _accept(engine, settings, body, request.state.request_id)
        if not body.stream:
            return await while_connected(request.receive, _answer(call))
        return event_stream(with_comments(_events(call), settings.waiting_comment_interval))

    return router


@dataclass
class _Call:
    """A generation and how it is answered; choice c of prompt p has index p · n + c."""

    body: CompletionRequest
    generation: Generation
    envelope: dict[str, Any]
    columns_of_prompts: dict[int, Columns] = field(default_factory=dict)  # n choices share them

    @property
    def name(self) -> Name:
        """What tokens are called in log-probabilities."""
        return namer(self.generation.engine.tokenizer, as_ids=self.body.return_tokens_as_token_ids)

    def prompt_columns(self, prompt: int) -> Columns | None:
        """None unless the prompt is echoed with log-probabilities."""
        top = self.body.logprobs
        if not self.body.echo or top is None:
            return None
        if prompt not in self.columns_of_prompts:
            generation = self.generation
            tokenizer, scores = generation.engine.tokenizer, generation.prompt_scores[prompt]
            ids, offsets = generation.prompts[prompt].token_ids, generation.prompts[prompt].offsets
            if offsets is None:
                offsets = offsets_of_ids(tokenizer, ids)
            self.columns_of_prompts[prompt] = prompt_columns(self.name, ids, offsets, scores, top)
        return self.columns_of_prompts[prompt]

    def offsets(self, prompt: int) -> TextOffsets:
        """Of the tokens generated behind a prompt; they count from its beginning, echoed or not."""
        tokenizer, ids = self.generation.engine.tokenizer, self.generation.prompts[prompt].token_ids
        return TextOffsets(
            tokenizer,
            start=len(self.generation.prompt_text(prompt)),
            skip_special=self.body.skip_special_tokens,
            prefix=unfinished_bytes(tokenizer, ids),
        )

    def columns(self, token_ids: list[int], scores: Logprobs, offsets: TextOffsets) -> Columns:
        assert self.body.logprobs is not None
        taken = offsets.take(token_ids)
        return columns(self.name, token_ids, scores, taken, self.body.logprobs)


async def _files(engine: AsyncEngine, settings: Settings, body: CompletionRequest, request: Request) -> Response:
    """The log-probabilities of the prompts' tokens, as /v1/perplexity gives those of texts by method full."""
    if body.max_tokens or body.prompt_logprobs is None:
        name = "max_tokens" if body.max_tokens else "prompt_logprobs"
        raise InvalidRequest(f"{name}: a safetensors answer needs max_tokens 0 and prompt_logprobs", param=name)
    for name in ("echo", "logprobs", "stream", "return_token_ids", "return_tokens_as_token_ids"):
        if getattr(body, name) not in (None, False):
            raise InvalidRequest(f"{name}: does not go with a safetensors answer", param=name)
    check_sampling(body, settings)
    check_sequences(1 if body.prompt is None else len(body.prompt), 1, settings)
    if body.prompt is None:
        prompts = [start_of_document(engine)]
    else:
        prompts = await tokenize(engine, "prompt", body.prompt, add_special_tokens=body.add_special_tokens)
    most = engine.max_model_len
    prompts = [truncate(prompt, body.truncate_prompt_tokens, most, body.truncation_side) for prompt in prompts]

    def validate() -> None:
        for prompt in prompts:
            engine.validate(prompt.token_ids, 0, prompt.where, "max_tokens")

    await asyncio.to_thread(validate)

    async def texts() -> AsyncGenerator[Text]:
        for prompt in prompts:
            yield Text(prompt.where, "", prompt.token_ids, (), Tally())

    return safetensors_stream(
        texts(),
        engine,
        settings,
        request,
        Convention("full", most, None, add_bos=False, prefix_token_id=None),
        body.prompt_logprobs,
        "prompt_logprobs",
        priority=body.priority,
        cache_salt=body.cache_salt or "",
    )


async def _accept(engine: AsyncEngine, settings: Settings, body: CompletionRequest, request_id: str) -> _Call:
    """Tokenize the prompts and refuse what the model cannot do."""
    check_sampling(body, settings)
    body.take_all(engine.tokenizer.vocab_size)
    check_sequences(1 if body.prompt is None else len(body.prompt), body.width, settings)
    if body.prompt is None:
        prompts = [start_of_document(engine)]
    else:
        prompts = await tokenize(
            engine,
            "prompt",
            body.prompt,
            add_special_tokens=body.add_special_tokens,
            with_offsets=body.echo and body.logprobs is not None,
        )
    max_prompt_tokens = engine.max_model_len - body.max_tokens
    width = body.width if body.max_tokens else 1  # nothing differs between choices that generate nothing
    ranked = 0 if width > body.n else None
    logprobs = body.logprobs if body.logprobs is not None else ranked
    params = await asyncio.to_thread(
        body.sampling_params,
        engine.tokenizer,
        body.max_tokens,
        logprobs,
        body.scores_prompts,
        engine.sampling_defaults,
    )
    generation = await begin(
        engine,
        settings,
        body,
        [truncate(prompt, body.truncate_prompt_tokens, max_prompt_tokens, body.truncation_side) for prompt in prompts],
        request_id,
        width=width,
        params=params,
    )
    return _Call(
        body, generation, completion_envelope(request_id, int(time.time()), settings.model_name, engine.fingerprint)
    )


async def _answer(call: _Call) -> Response:
    """The whole answer."""
    done = await call.generation.collect()
    return await large_json_response(call.generation.answer_size(), lambda: _whole(call, done))


def _whole(call: _Call, done: list[Completion]) -> dict[str, Any]:
    generation, n = call.generation, call.body.n
    choices = []
    for prompt in range(len(generation.prompts)):
        of_prompt = done[prompt * generation.width : (prompt + 1) * generation.width]
        if generation.width > n:
            of_prompt = sorted(of_prompt, key=lambda completed: -completed.mean_logprob)[:n]
        chosen = of_prompt if generation.width >= n else of_prompt * n
        choices += [_choice(call, prompt, prompt * n + c, completed) for c, completed in enumerate(chosen)]
    return {**call.envelope, "choices": choices, "usage": generation.usage()}


def _choice(call: _Call, prompt: int, index: int, completed: Completion) -> dict[str, Any]:
    body, generation = call.body, call.generation
    text = (generation.prompt_text(prompt) if body.echo else "") + completed.text
    logprobs = None
    if body.logprobs is not None:
        echoed = call.prompt_columns(prompt)
        own = call.columns(completed.token_ids, completed.logprobs, call.offsets(prompt))
        logprobs = own if echoed is None else join([echoed, own])
    found = completion_choice(index, text, logprobs, completed.finish_reason, completed.stop_reason)
    prompt_ids = generation.prompts[prompt].token_ids
    if body.prompt_logprobs is not None:
        scores = generation.prompt_scores[prompt]
        tokenizer = generation.engine.tokenizer
        found["prompt_logprobs"] = prompt_logprobs(tokenizer, prompt_ids, scores, body.prompt_logprobs)
    if body.return_token_ids:
        found |= {"prompt_token_ids": prompt_ids, "token_ids": completed.token_ids}
    return found


async def _events(call: _Call) -> AsyncGenerator[Line]:
    """The answer as events: the prompt first if it is echoed, a chunk per output, the usage if requested, [DONE]."""
    body, generation = call.body, call.generation

    def whole(entry: dict[str, Any], unsent: int = 0) -> dict[str, Any]:
        return {**call.envelope, "choices": [entry], **generation.chunk_usage(unsent)}

    def opening(index: int, prompt: int, unsent: int) -> dict[str, Any]:
        """What comes before the first token of a choice: the echo, the ids of the prompt."""
        text = generation.prompt_text(prompt) if body.echo else ""
        first = completion_choice(index, text, call.prompt_columns(prompt), None, None)
        if body.return_token_ids:
            first |= {"prompt_token_ids": generation.prompts[prompt].token_ids, "token_ids": []}
        return whole(first, unsent)

    def chunk(index: int, prompt: int, output: RequestOutput) -> dict[str, Any]:
        logprobs = None
        if output.logprobs is not None:
            if index not in offsets:
                offsets[index] = call.offsets(prompt)
            logprobs = call.columns(output.token_ids, output.logprobs, offsets[index])
        finish_reason = None if output.finish_reason is None else output.finish_reason.value
        entry = completion_choice(index, output.text, logprobs, finish_reason, output.stop_reason)
        return whole({**entry, "token_ids": output.token_ids} if body.return_token_ids else entry)

    columns = 1 + (body.logprobs or 0)
    copies = 1 if generation.width == body.n else body.n  # of what max_tokens 0 says once
    all_alike = not (body.return_token_ids or generation.counts_in_chunks)  # except their text
    with_texts: dict[int, Callable[[str], str]] = {}  # of the choices that have begun
    offsets: dict[int, TextOffsets] = {}
    async with aclosing(generation.run()) as outputs:
        async for sequence, output in outputs:
            prompt = sequence // generation.width
            for index in range(sequence * copies, (sequence + 1) * copies):
                if index not in with_texts:
                    if body.echo or body.return_token_ids:
                        size = columns * len(generation.prompts[prompt].token_ids)
                        yield await large_json(size, partial(opening, index, prompt, len(output.token_ids)))
                    with_texts[index] = with_text(whole(completion_choice(index, TEXT, None, None, None)))
                if all_alike and output.logprobs is None and output.finish_reason is None:
                    if output.text:
                        yield with_texts[index](output.text)
                    continue
                ids = body.return_token_ids and output.token_ids
                if output.text or output.logprobs is not None or output.finish_reason is not None or ids:
                    yield await large_json(columns * len(output.token_ids), partial(chunk, index, prompt, output))
    if generation.sends_usage:
        yield to_json({**call.envelope, "choices": [], "usage": generation.usage()})
    yield DONE
