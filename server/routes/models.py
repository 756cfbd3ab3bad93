"""GET /v1/models and GET /v1/models/{name}."""

from __future__ import annotations

import time

from fastapi import APIRouter, Path

from server.engine.async_engine import AsyncEngine
from server.model_card import description
from server.protocol.answers import ModelCard, ModelList
from server.routes.described import responses
from server.routes.prompts import check_model
from server.settings import Settings


def models_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """The routes; the server has one model, under one name or several."""
    router = APIRouter(tags=["OpenAI"])
    created = int(time.time())
    about = description(settings.model)
    cards = {
        name: ModelCard(
            id=name,
            created=created,
            root=settings.model_name,
            max_model_len=engine.max_model_len,
            description=about,
            chat=engine.tokenizer.has_chat_template,
            cache_bytes_per_token=engine.backend.cache_bytes_per_token,
            dense_cache_bytes_per_token=engine.backend.dense_cache_bytes_per_token,
        )
        for name in settings.model_names
    }

    @router.get("/v1/models", summary="The models served", responses=responses(None))
    async def models() -> ModelList:
        """The model, by each of its names."""
        return ModelList(data=list(cards.values()))

    @router.get("/v1/models/{name:path}", summary="One model", responses=responses(None, 404))
    async def model(
        name: str = Path(description="One of its names.", examples=[settings.model_name]),
    ) -> ModelCard:
        """The model by one of its names."""
        check_model(name, settings)
        return cards[name]

    return router
