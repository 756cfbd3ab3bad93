"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.engine.async_engine import AsyncEngine
from server.engine.request import Completion, Logprobs, RequestOutput
from server.errors import ContextLength
from server.protocol.chat import ChatCompletionRequest, ChatCompletionResponse, chat_choice, chat_chunk, chat_envelope
from server.protocol.logprobs import chat_logprobs, namer, prompt_logprobs
from server.routes.body import JsonRoute
from server.routes.generation import Generation, begin
from server.routes.limits import check_messages, check_sampling, check_sequences
from server.routes.prompts import check_model, rendered, tokenize, truncate
from server.routes.respond import TEXT, large_json, large_json_response, to_json, while_connected, with_text
from server.routes.responses import WITH_ENGINE, responses
from server.routes.stream import DONE, event_stream
from server.routes.waiting import with_comments
from server.settings import Settings


def chat_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """The route over one engine."""
    router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)

    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        responses=responses(ChatCompletionResponse, *WITH_ENGINE, streams=True),
    )
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        check_model(body.model, settings)
        call = await _accept(engine, settings, body, request.state.request_id)
        if not body.stream:
            return await while_connected(request.receive, _answer(call))
        return event_stream(with_comments(_events(call), settings.waiting_comment_interval))

    return router


@dataclass
class _Call:
    """A generation and how it is answered; sequence c is choice c."""

    body: ChatCompletionRequest
    generation: Generation
    envelope: dict[str, Any]

    def logprobs(self, token_ids: list[int], scores: Logprobs) -> dict[str, Any] | None:
        top = self.body.alternatives
        tokenizer = self.generation.engine.tokenizer
        name = namer(tokenizer, as_ids=self.body.return_tokens_as_token_ids)
        return None if top is None else chat_logprobs(tokenizer, name, token_ids, scores, top)


async def _accept(engine: AsyncEngine, settings: Settings, body: ChatCompletionRequest, request_id: str) -> _Call:
    """The conversation as a prompt, and what the model cannot do refused."""
    check_sampling(body, settings)
    body.take_all(engine.tokenizer.vocab_size)
    check_messages(body.messages, settings)
    check_sequences(1, body.n, settings)
    tokenizer = engine.tokenizer
    text = await asyncio.to_thread(rendered, tokenizer, body)
    (prompt,) = await tokenize(engine, "messages", [text], add_special_tokens=body.add_special_tokens)
    limit_field, limit = body.limit
    most = engine.max_model_len - (limit or 1)
    prompt = truncate(prompt, body.truncate_prompt_tokens, most, body.truncation_side)
    tokens_left = engine.max_model_len - len(prompt.token_ids)
    if tokens_left < 1:
        raise ContextLength(
            f"messages: {len(prompt.token_ids)} tokens leave no place for an answer",
            engine.max_model_len,
            param="messages",
        )
    params = await asyncio.to_thread(
        body.sampling_params,
        tokenizer,
        tokens_left if limit is None else limit,
        body.alternatives,
        body.prompt_logprobs,
        engine.sampling_defaults,
    )
    generation = await begin(
        engine,
        settings,
        body,
        [prompt],
        request_id,
        width=body.n,
        params=replace(params, stop=(*params.stop, *tokenizer.chat_stop)),
        limit_field=limit_field,
    )
    return _Call(
        body,
        generation,
        chat_envelope(request_id, int(time.time()), settings.model_name, engine.fingerprint, stream=body.stream),
    )


async def _answer(call: _Call) -> Response:
    """The whole answer."""
    completed = await call.generation.collect()
    return await large_json_response(call.generation.answer_size(), lambda: _whole(call, completed))


def _whole(call: _Call, completed: list[Completion]) -> dict[str, Any]:
    body, generation = call.body, call.generation
    choices = []
    for index, done in enumerate(completed):
        logprobs = call.logprobs(done.token_ids, done.logprobs)
        choice = chat_choice(index, done.text, logprobs, done.finish_reason, done.stop_reason)
        choices.append({**choice, "token_ids": done.token_ids} if body.return_token_ids else choice)
    found = {**call.envelope, "choices": choices, "usage": generation.usage()}
    prompt_ids = generation.prompts[0].token_ids
    if body.prompt_logprobs is not None:
        scores = generation.prompt_scores[0]
        found["prompt_logprobs"] = prompt_logprobs(
            generation.engine.tokenizer, prompt_ids, scores, body.prompt_logprobs
        )
    if body.return_token_ids:
        found["prompt_token_ids"] = prompt_ids
    return found


async def _events(call: _Call) -> AsyncGenerator[str]:
    """The answer as events: of each choice its role, a chunk per output and its end; the usage if requested, [DONE]."""
    body, generation = call.body, call.generation

    def whole(entry: dict[str, Any], unsent: int = 0, **more: Any) -> dict[str, Any]:
        return {**call.envelope, "choices": [entry], **more, **generation.chunk_usage(unsent)}

    def chunk(index: int, output: RequestOutput) -> dict[str, Any]:
        logprobs = None if output.logprobs is None else call.logprobs(output.token_ids, output.logprobs)
        entry = chat_chunk(index, {"content": output.text}, logprobs)
        return whole({**entry, "token_ids": output.token_ids} if body.return_token_ids else entry)

    rows = 1 + (body.alternatives or 0)
    all_alike = not (body.return_token_ids or generation.counts_in_chunks)  # except their text
    with_texts: dict[int, Callable[[str], str]] = {}  # of the choices that have begun
    async with aclosing(generation.run()) as outputs:
        async for index, output in outputs:
            if index not in with_texts:
                ids = {"prompt_token_ids": generation.prompts[0].token_ids} if body.return_token_ids else {}
                role = chat_chunk(index, {"role": "assistant", "content": ""})
                yield to_json(whole(role, len(output.token_ids), **ids))
                with_texts[index] = with_text(whole(chat_chunk(index, {"content": TEXT})))
            if all_alike and output.logprobs is None and output.finish_reason is None:
                if output.text:
                    yield with_texts[index](output.text)
                continue
            if output.text or output.logprobs is not None or (body.return_token_ids and output.token_ids):
                yield await large_json(rows * len(output.token_ids), partial(chunk, index, output))
            if output.finish_reason is not None:
                end = chat_chunk(index, {}, None, output.finish_reason.value)
                yield to_json(whole({**end, "stop_reason": output.stop_reason}))
    if generation.sends_usage:
        yield to_json({**call.envelope, "choices": [], "usage": generation.usage()})
    yield DONE
