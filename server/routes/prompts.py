"""Inputs of a request to token ids, checked against the model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.async_engine import AsyncEngine
from server.errors import InvalidRequest, NotFound
from server.settings import Settings

LONG_TEXT = 2000  # characters; below, tokenizing is over before a thread would have started


@dataclass(frozen=True)
class Prompt:
    """`where` is its place in the request, for messages; `text` is None if it came as token ids."""

    where: str
    text: str | None
    token_ids: list[int]


def check_model(name: str, settings: Settings) -> None:
    """Raises NotFound unless the server serves `name`."""
    if name != settings.model_name:
        raise NotFound(
            f"model: {name!r} does not exist; this server has {settings.model_name!r}",
            param="model",
            code="model_not_found",
        )


async def tokenize(engine: AsyncEngine, field: str, inputs: Sequence[str | list[int]]) -> list[Prompt]:
    """Token ids of every input; long texts are tokenized beside the event loop.

    Raises:
        InvalidRequest: an input is empty or has a token id outside the vocabulary.
    """
    texts = [text for text in inputs if isinstance(text, str)]
    if sum(map(len, texts)) > LONG_TEXT:
        encoded = await asyncio.to_thread(lambda: [engine.tokenizer.encode(text) for text in texts])
    else:
        encoded = [engine.tokenizer.encode(text) for text in texts]
    vocab = engine.tokenizer.vocab_size
    prompts: list[Prompt] = []
    for i, item in enumerate(inputs):
        where = field if len(inputs) == 1 else f"{field}[{i}]"
        if isinstance(item, str):
            prompts.append(Prompt(where, item, encoded[i]))
        else:
            if wrong := [token for token in item if not 0 <= token < vocab]:
                raise InvalidRequest(f"{where}: token id {wrong[0]} is outside the vocabulary of {vocab}", param=where)
            prompts.append(Prompt(where, None, item))
        if not prompts[-1].token_ids:
            raise InvalidRequest(f"{where}: is empty; it must have at least one token", param=where)
    return prompts
