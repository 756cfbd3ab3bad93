"""POST /v1/completions: request fields, and the answer, built as plain dicts for speed."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from server.errors import InvalidRequest
from server.protocol.inputs import Inputs
from server.protocol.sampling import FINGERPRINT, MAX_LOGPROBS, SamplingBody, Usage


class CompletionRequest(SamplingBody):
    """Text that continues a prompt."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SamplingBody.unsupported,
        "suffix": ("",),
        "store": (False,),
        "service_tier": ("auto", "default"),
    }

    prompt: Inputs | None = Field(
        None,
        description="A text, a list of texts, token ids or a list of lists of them (default: the start of a document).",
        examples=["Once upon a time"],
    )
    max_tokens: int = Field(
        16, ge=0, description="Most tokens to generate; 0, with echo or prompt_logprobs, returns the prompt only."
    )
    max_completion_tokens: int | None = Field(
        None, ge=0, description="Chats' name of max_tokens; it wins where both are given."
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=20,
        description="Generate so many for each prompt and return the n with the highest mean log-probability of their "
        "tokens; at least n, not with `stream` (default: n).",
    )
    logprobs: int | None = Field(
        None,
        ge=-1,
        le=MAX_LOGPROBS,
        description="Log-probabilities of the tokens, with this many alternatives for each; -1: all tokens.",
    )
    echo: bool = Field(False, description="Begin the answer with the prompt.")
    add_special_tokens: bool = Field(
        True, description="Let the tokenizer add its special tokens (such as BOS) to prompts that are texts."
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        self.check_together()
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise InvalidRequest(
                "max_tokens: 0 needs echo or prompt_logprobs; without them there is nothing to answer",
                param="max_tokens",
            )
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequest(f"best_of: {self.best_of} is less than n = {self.n}", param="best_of")
        if self.stream and self.width > self.n:
            raise InvalidRequest("best_of: does not go with stream", param="best_of")
        return self

    @property
    def width(self) -> int:
        """Sequences generated for each prompt."""
        return self.n if self.best_of is None else self.best_of

    @property
    def scores_prompts(self) -> int | None:
        """Alternatives wanted for each token of the prompts; None: their log-probabilities are not wanted."""
        wanted = [self.logprobs] if self.echo else []
        return max((top for top in (*wanted, self.prompt_logprobs) if top is not None), default=None)


def completion_envelope(request_id: str, created: int, model: str, fingerprint: str) -> dict[str, Any]:
    """The fields before `choices` of the answer and of every chunk of a stream; `created` in seconds since 1970."""
    envelope = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": created, "model": model}
    return {**envelope, "system_fingerprint": fingerprint}


def completion_choice(
    index: int,
    text: str,
    logprobs: dict[str, list[Any]] | None,
    finish_reason: str | None,
    stop_reason: int | str | None,
) -> dict[str, Any]:
    """An entry of `choices`, of a whole answer or of a chunk; `stop_reason` is the stop token or text that ended it."""
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


class CompletionLogprobs(BaseModel):
    """Columns with an entry for each token."""

    tokens: list[str] = Field(description=r"Texts; `bytes:\xe2` for a token that is no text by itself.")
    token_logprobs: list[float | None] = Field(description="Natural logarithms; null for a prompt's first token.")
    top_logprobs: list[dict[str, float] | None] = Field(description="The most probable tokens and the token itself.")
    text_offset: list[int] = Field(description="Where tokens begin, in characters from the beginning of the prompt.")


class CompletionChoice(BaseModel):
    """One completion."""

    index: int = Field(description="prompt · n + choice.")
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None = Field(
        description="stop: the text ended, or a stop string or token came. length: max_tokens or the context is full. "
        "null in chunks before the last."
    )
    stop_reason: int | str | None = Field(description="The stop token or text that ended it.")
    prompt_logprobs: list[dict[str, Any] | None] | None = Field(
        None, description="For each token of the prompt, by token id: logprob, rank (from 1) and decoded_token."
    )
    prompt_token_ids: list[int] | None = Field(None, description="With return_token_ids.")
    token_ids: list[int] | None = Field(None, description="With return_token_ids.")


class CompletionResponse(BaseModel):
    """The answer; it documents the dicts above and is never built."""

    id: str = Field(examples=["cmpl-4f1c"])
    object: Literal["text_completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[CompletionChoice]
    usage: Usage | None = None
