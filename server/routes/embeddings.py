"""POST /v1/embeddings."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.engine.async_engine import AsyncEngine
from server.engine.hidden_states import Floats, HiddenSpec
from server.errors import InvalidRequest
from server.protocol.embeddings import (
    EmbeddingsRequest,
    EmbeddingsResponse,
    embedding_of,
    embedding_spec,
    embeddings_fields,
)
from server.routes.body import JsonRoute
from server.routes.described import WITH_ENGINE, responses
from server.routes.limits import check_count
from server.routes.prompts import Prompt, check_model, tokenize_whole
from server.routes.respond import deadline_of, large_json_response, while_connected
from server.routes.scoring import Scorer
from server.settings import Settings

MAX_NUMBERS = 1 << 23  # of one answer: 2048 texts of 4096 numbers, about 170 MB of JSON


def embeddings_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """The route over one engine."""
    router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)
    config = engine.model_config

    @router.post(
        "/v1/embeddings",
        summary="Vectors of texts",
        responses=responses(EmbeddingsResponse, *WITH_ENGINE),
    )
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Hidden states of the language model, after its final norm. No embedder was trained: see the documents."""
        check_model(body.model, settings)
        check_count("input", "texts", len(body.input), settings.max_sequences, "max_sequences")
        width = config.hidden_size if body.dimensions is None else body.dimensions
        if width > config.hidden_size:
            raise InvalidRequest(
                f"dimensions: {width} are more than {config.hidden_size}, the model's hidden_size", param="dimensions"
            )
        if len(body.input) * width > MAX_NUMBERS:
            raise InvalidRequest(
                f"input: {len(body.input)} texts of {width} numbers are more than {MAX_NUMBERS} numbers, the most in "
                "one answer",
                param="input",
            )
        prompts = await tokenize_whole(engine, body.input, body.add_special_tokens)
        scorer = Scorer(engine, settings, request.state.request_id)
        found = scorer.in_order(_jobs(scorer, body, prompts, config.num_hidden_layers), deadline_of(settings))
        vectors = await while_connected(request.receive, _all(found))
        tokens = sum(len(prompt.token_ids) for prompt in prompts)
        make = partial(embeddings_fields, settings.model_name, vectors, body.encoding_format, tokens)
        return await large_json_response(len(vectors) * width, make)

    return router


async def _jobs(
    scorer: Scorer, body: EmbeddingsRequest, prompts: list[Prompt], last_layer: int
) -> AsyncGenerator[Coroutine[Any, Any, Floats]]:
    """The vector of every text, in order."""
    for prompt in prompts:
        yield _vector(scorer, body, prompt, embedding_spec(body.pooling, len(prompt.token_ids), last_layer))


async def _vector(scorer: Scorer, body: EmbeddingsRequest, prompt: Prompt, spec: HiddenSpec) -> Floats:
    hidden = await scorer.hidden_states(prompt.token_ids, spec)
    return embedding_of(hidden[0, 0], body.dimensions, normalize=body.normalize)


async def _all(found: AsyncGenerator[Floats]) -> list[Floats]:
    async with aclosing(found):
        return [vector async for vector in found]
