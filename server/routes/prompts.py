"""Inputs of a request to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from server.engine.async_engine import AsyncEngine
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequest, NotFound
from server.protocol.chat import ChatCompletionRequest
from server.protocol.inputs import check_text, entry_loc
from server.protocol.tokenize import TokenizeRequest
from server.settings import Settings

LONG_TEXT = 2000  # characters; below, tokenizing is over before a thread would have started
MANY = 16  # texts


@dataclass(frozen=True)
class Prompt:
    """`where` names it in the request, for messages; `text` is None if it came as token ids. `offsets`, where they
    are wanted, are the characters of a text at which its tokens begin."""

    where: str
    text: str | None
    token_ids: list[int]
    offsets: list[int] | None = None


def check_model(name: str | None, settings: Settings) -> None:
    """Raises NotFound unless the server serves `name`; None is its only model."""
    if name is not None and name not in settings.model_names:
        names = ", ".join(map(repr, settings.model_names))
        raise NotFound(
            f"model: {name!r} does not exist; this server has {names}",
            param="model",
            code="model_not_found",
        )


async def tokenize(
    engine: AsyncEngine,
    field: str,
    inputs: Sequence[str | list[int]],
    *,
    add_special_tokens: bool = True,
    with_offsets: bool = False,
) -> list[Prompt]:
    """Token ids of every input; long texts are tokenized beside the event loop."""

    def read() -> list[Prompt]:
        return [
            _prompt(engine.tokenizer, entry_loc(field, i, len(inputs)), item, add_special_tokens, with_offsets)
            for i, item in enumerate(inputs)
        ]

    return await asyncio.to_thread(read) if sum(map(len, inputs)) > LONG_TEXT or len(inputs) > MANY else read()


def _prompt(
    tokenizer: Tokenizer, where: str, item: str | list[int], add_special_tokens: bool, with_offsets: bool
) -> Prompt:
    if isinstance(item, str):
        if with_offsets:
            return Prompt(where, item, *tokenizer.encode_with_offsets(item, add_special_tokens=add_special_tokens))
        return Prompt(where, item, tokenizer.encode(item, add_special_tokens=add_special_tokens))
    return Prompt(where, None, item)


def rendered(tokenizer: Tokenizer, body: ChatCompletionRequest | TokenizeRequest) -> str:
    """The text of a request's messages, by the chat template.

    Raises:
        InvalidRequest: the template refuses them, or they hold half a surrogate pair; the message names `messages`.
    """
    text = tokenizer.render_chat(
        [message.to_template() for message in body.messages or ()],
        add_generation_prompt=(
            not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
        ),
        continue_final_message=body.continue_final_message,
        tools=[tool.to_template() for tool in body.tools],
        kwargs=body.chat_template_kwargs,
    )
    check_text(text, "messages")
    return text


def start_of_document(engine: AsyncEngine) -> Prompt:
    """The default prompt: BOS, or else EOS.

    Raises:
        InvalidRequest: the model has neither.
    """
    tokenizer = engine.tokenizer
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise InvalidRequest("prompt: is required, since this model has no token that begins a text", param="prompt")
    return Prompt("prompt", None, [token])


def truncate(prompt: Prompt, keep: int | None, max_prompt_tokens: int, side: Literal["left", "right"]) -> Prompt:
    """The prompt cut to `keep` tokens on one side, as vLLM's truncate_prompt_tokens and truncation_side.

    `keep`: None is the whole prompt, -1 is `max_prompt_tokens`.
    """
    limit = len(prompt.token_ids) if keep is None else max(max_prompt_tokens, 1) if keep == -1 else keep
    if len(prompt.token_ids) <= limit:
        return prompt
    return Prompt(prompt.where, None, prompt.token_ids[-limit:] if side == "left" else prompt.token_ids[:limit])
