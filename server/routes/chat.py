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
from server.engine.tool_grammar import ToolChoice
from server.engine.tool_reader import ToolReader
from server.errors import ContextLength
from server.protocol.chat import ChatCompletionRequest, ChatCompletionResponse, chat_choice, chat_chunk, chat_envelope
from server.protocol.logprobs import chat_logprobs, namer, prompt_logprobs
from server.protocol.tools import delta_entry
from server.routes.body import JsonRoute
from server.routes.described import WITH_ENGINE, responses
from server.routes.generation import Generation, begin
from server.routes.limits import check_messages, check_sampling, check_sequences
from server.routes.prompts import check_model, rendered, tokenize, truncate
from server.routes.respond import TEXT, large_json, large_json_response, to_json, while_connected, with_text
from server.routes.stream import DONE, Line, event_stream
from server.routes.tools import finish_reason, with_tools
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
        call = await accept(engine, settings, body, request.state.request_id)
        if not body.stream:
            return await while_connected(request.receive, _answer(call))
        return event_stream(with_comments(_events(call), settings.waiting_comment_interval))

    return router


@dataclass
class ChatCall:
    """A generation and how it is answered; sequence c is choice c."""

    body: ChatCompletionRequest
    generation: Generation
    envelope: dict[str, Any]
    choice: ToolChoice | None  # None: text alone

    def reader(self) -> ToolReader:
        return ToolReader(self.generation.engine.tokenizer.call_syntax)

    def finish_reason(self, reader: ToolReader | None, reason: str) -> str:
        return reason if self.choice is None or reader is None else finish_reason(self.choice, reader, reason)

    def logprobs(self, token_ids: list[int], scores: Logprobs) -> dict[str, Any] | None:
        top = self.body.alternatives
        tokenizer = self.generation.engine.tokenizer
        name = namer(tokenizer, as_ids=self.body.return_tokens_as_token_ids)
        return None if top is None else chat_logprobs(tokenizer, name, token_ids, scores, top)


async def accept(engine: AsyncEngine, settings: Settings, body: ChatCompletionRequest, request_id: str) -> ChatCall:
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
    params = replace(params, stop=(*params.stop, *tokenizer.chat_stop))
    if (choice := body.choice) is not None:
        if params.grammar is not None:
            await engine.compile_grammar(params.grammar)  # by itself, so that an error names its field
        params = await asyncio.to_thread(with_tools, params, choice, tokenizer)
    generation = await begin(
        engine,
        settings,
        body,
        [prompt],
        request_id,
        width=body.n,
        params=params,
        limit_field=limit_field,
    )
    return ChatCall(
        body,
        generation,
        chat_envelope(request_id, int(time.time()), settings.model_name, engine.fingerprint, stream=body.stream),
        choice,
    )


async def _answer(call: ChatCall) -> Response:
    """The whole answer."""
    completed = await call.generation.collect()
    return await large_json_response(call.generation.answer_size(), lambda: _whole(call, completed))


def _whole(call: ChatCall, completed: list[Completion]) -> dict[str, Any]:
    body, generation = call.body, call.generation
    choices = []
    for index, done in enumerate(completed):
        logprobs = call.logprobs(done.token_ids, done.logprobs)
        content: str | None = done.text
        reader = None if call.choice is None else call.reader()
        if reader is not None:
            reader.feed(done.text, last=True)
            content = reader.content or (None if reader.calls else "")
        reason = None if done.finish_reason is None else call.finish_reason(reader, done.finish_reason.value)
        choice = chat_choice(index, content, logprobs, reason, done.stop_reason, reader.calls if reader else ())
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


async def _events(call: ChatCall) -> AsyncGenerator[Line]:
    """The answer as events: of each choice its role, a chunk per output and its end; the usage if requested, [DONE]."""
    body, generation = call.body, call.generation

    def whole(entry: dict[str, Any], unsent: int = 0, **more: Any) -> dict[str, Any]:
        return {**call.envelope, "choices": [entry], **more, **generation.chunk_usage(unsent)}

    def chunk(index: int, output: RequestOutput, delta: dict[str, Any]) -> dict[str, Any]:
        logprobs = None if output.logprobs is None else call.logprobs(output.token_ids, output.logprobs)
        entry = chat_chunk(index, delta, logprobs)
        return whole({**entry, "token_ids": output.token_ids} if body.return_token_ids else entry)

    def read(output: RequestOutput, reader: ToolReader | None) -> dict[str, Any]:
        """What an output adds to its message."""
        if reader is None:
            return {"content": output.text} if output.text else {}
        content, deltas = reader.feed(output.text, last=output.finish_reason is not None)
        calls = [delta_entry(delta, reader.calls) for delta in deltas]
        return {**({"content": content} if content else {}), **({"tool_calls": calls} if calls else {})}

    rows = 1 + (body.alternatives or 0)
    all_alike = not (body.return_token_ids or generation.counts_in_chunks)  # except their text
    with_texts: dict[int, Callable[[str], str]] = {}  # of the choices that have begun
    readers: dict[int, ToolReader] = {}
    async with aclosing(generation.run()) as outputs:
        async for index, output in outputs:
            if index not in with_texts:
                ids = {"prompt_token_ids": generation.prompts[0].token_ids} if body.return_token_ids else {}
                role = chat_chunk(index, {"role": "assistant", "content": "" if call.choice is None else None})
                yield to_json(whole(role, len(output.token_ids), **ids))
                with_texts[index] = with_text(whole(chat_chunk(index, {"content": TEXT})))
                if call.choice is not None:
                    readers[index] = call.reader()
            reader = readers.get(index)
            delta = read(output, reader)
            if all_alike and output.logprobs is None and output.finish_reason is None and "tool_calls" not in delta:
                if delta:
                    yield with_texts[index](delta["content"])
                continue
            if delta or output.logprobs is not None or (body.return_token_ids and output.token_ids):
                if reader is None:
                    delta = {"content": output.text}
                yield await large_json(rows * len(output.token_ids), partial(chunk, index, output, delta))
            if output.finish_reason is not None:
                end = chat_chunk(index, {}, None, call.finish_reason(reader, output.finish_reason.value))
                yield to_json(whole({**end, "stop_reason": output.stop_reason}))
    if generation.sends_usage:
        yield to_json({**call.envelope, "choices": [], "usage": generation.usage()})
    yield DONE
