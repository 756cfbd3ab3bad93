"""GET /v1/models."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter

from server.routes.prompts import check_model
from server.settings import Settings


def models_router(settings: Settings, max_model_len: int) -> APIRouter:
    """The routes; the server has one model."""
    router = APIRouter(tags=["OpenAI"])
    card = {
        "id": settings.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "lpa",
        "max_model_len": max_model_len,
    }

    @router.get("/v1/models", summary="The models served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> dict[str, Any]:
        check_model(name, settings)
        return card

    return router
