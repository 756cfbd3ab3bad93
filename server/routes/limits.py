"""Limits of one request: counts that settings bound, besides the size of its body."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.request import SamplingParams
from server.errors import InvalidRequest
from server.protocol.chat import Message
from server.protocol.sampling import SamplingBody
from server.settings import Settings

FEW = 20  # alternatives of a token, whose number is not limited
MAX_ALTERNATIVES = 1 << 20  # about 100 MB of JSON


def check_sampling(body: SamplingBody, settings: Settings) -> None:
    """Raises InvalidRequest for a list of the common fields that is too long."""
    for field, entries in (
        ("bad_words", body.bad_words),
        ("stop_token_ids", body.stop_token_ids),
        ("logit_bias", body.logit_bias),
    ):
        check_count(field, "entries", len(entries), settings.max_list_entries, "max_list_entries")
    check_count("stop", "bytes", _num_bytes(body.stop), settings.max_stop_bytes, "max_stop_bytes")
    check_count("bad_words", "bytes", _num_bytes(body.bad_words), settings.max_bad_words_bytes, "max_bad_words_bytes")


def check_sequences(num_prompts: int, width: int, settings: Settings) -> None:
    """Raises InvalidRequest for more sequences than a request may have; `width` are those of a prompt."""
    check_count("prompt", "prompts times n", num_prompts * width, settings.max_sequences, "max_sequences")


def check_messages(messages: Sequence[Message], settings: Settings) -> None:
    """Raises InvalidRequest for a conversation of too many messages; their parts are joined when a body is read."""
    check_count("messages", "messages", len(messages), settings.max_messages, "max_messages")


def check_count(field: str, what: str, count: int, limit: int, setting: str) -> None:
    """Raises InvalidRequest that names the field, the limit and the setting."""
    if count > limit:
        raise InvalidRequest(f"{field}: {count} {what} are more than {limit}, the server's {setting}", param=field)


def check_alternatives(prompt_tokens: Sequence[int], width: int, params: SamplingParams, limit_field: str) -> None:
    """Raises InvalidRequest if an answer may have more alternatives than MAX_ALTERNATIVES, where a token has more than
    FEW of them.

    Args:
        prompt_tokens: of each prompt.
        width: sequences of a prompt.
        limit_field: what says how many tokens may be generated.
    """
    top, of_prompt = params.logprobs or 0, params.prompt_logprobs or 0
    if of_prompt > FEW and (count := sum(prompt_tokens) * of_prompt) > MAX_ALTERNATIVES:
        raise InvalidRequest(
            f"prompt_logprobs: {of_prompt} alternatives for {sum(prompt_tokens)} tokens are {count}, more than "
            f"{MAX_ALTERNATIVES}, the most in one answer; /v1/completions and /v1/perplexity stream any number of them "
            "as safetensors",
            param="prompt_logprobs",
        )
    tokens = len(prompt_tokens) * width * params.max_tokens
    if top > FEW and (count := tokens * top) > MAX_ALTERNATIVES:
        raise InvalidRequest(
            f"{limit_field}: {top} alternatives for each of {tokens} tokens are {count}, more than {MAX_ALTERNATIVES}, "
            "the most in one answer",
            param=limit_field,
        )


def _num_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode(errors="replace")) for text in texts)
