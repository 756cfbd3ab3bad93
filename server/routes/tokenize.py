"""POST /tokenize, POST /detokenize and GET /tokenizer_info."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from server.engine.async_engine import AsyncEngine
from server.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from server.routes.body import JsonRoute
from server.routes.described import WITH_BODY, responses
from server.routes.limits import check_messages
from server.routes.prompts import check_model, rendered
from server.routes.respond import SMALL, json_response, large_json_response
from server.settings import Settings


def tokenize_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """The routes over one engine's tokenizer."""
    router = APIRouter(tags=["Tokens"], route_class=JsonRoute)
    tokenizer = engine.tokenizer

    @router.post("/tokenize", summary="Tokens of a text", responses=responses(TokenizeResponse, *WITH_BODY))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation in the model's chat template."""
        check_model(body.model, settings)
        check_messages(body.messages or (), settings)
        return await large_json_response(_size(body), lambda: _answer(body))

    def _answer(body: TokenizeRequest) -> dict[str, Any]:
        ids = _encode(body)
        name = cache(tokenizer.backend.id_to_token)  # a million equal texts are one object
        names = [name(i) or "" for i in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": engine.max_model_len, "tokens": ids, "token_strs": names}

    def _encode(body: TokenizeRequest) -> list[int]:
        if body.messages is None:
            return tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
        text = rendered(tokenizer, body)
        return tokenizer.encode(text, add_special_tokens=body.add_special_tokens is True)

    @router.post("/detokenize", summary="Text of tokens", responses=responses(DetokenizeResponse, *WITH_BODY))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids; special tokens are written out, so that /tokenize gives the same ids again."""
        check_model(body.model, settings)
        return await large_json_response(len(body.tokens), lambda: {"prompt": _decode(body.tokens)})

    def _decode(ids: list[int]) -> str:
        tokenizer.check(ids, "tokens")
        return tokenizer.decode(ids, skip_special_tokens=False)

    @router.get("/tokenizer_info", summary="The tokenizer's settings", responses=responses(TokenizerInfo))
    async def tokenizer_info() -> Response:
        """tokenizer_config.json, special tokens as texts, with the chat template in use."""
        return json_response(_info(engine))

    return router


def _size(body: TokenizeRequest) -> int:
    return len(body.prompt or "") if body.messages is None else SMALL + 1


def _info(engine: AsyncEngine) -> dict[str, Any]:
    tokenizer = engine.tokenizer
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token")),
        "model_max_length": engine.max_model_len,
        **tokenizer.tokenizer_config,
        **tokenizer.special_tokens,
        "chat_template": tokenizer.chat_template,
        "vocab_size": tokenizer.vocab_size,
    }
