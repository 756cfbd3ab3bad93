"""POST /v1/chat/completions: what may be asked, and the answer, built as plain dicts for speed."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from server.errors import InvalidRequest
from server.protocol.body import RequestBody
from server.protocol.sampling import MAX_LOGPROBS, SamplingBody, Usage

PARTS_JOINED_BY = "\n"  # as vLLM does


class TextPart(RequestBody):
    """A piece of a message."""

    type: Literal["text"] = Field(description="Only text is understood.")
    text: str = Field(description="The piece.", examples=["Tell me a story."])


class Message(RequestBody):
    """One turn of a conversation."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tool_calls": ([],),
        "function_call": (),
        "tool_call_id": (),
        "audio": (),
    }

    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who speaks.", examples=["user"])
    content: str | list[TextPart] = Field(
        "", description="A text, or parts of one, which are joined by line breaks.", examples=["Tell me a story."]
    )
    name: str | None = Field(None, description="Handed to the chat template.")
    refusal: str | None = Field(None, description="Taken and not used.")

    def to_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        text = self.content
        if not isinstance(text, str):
            text = PARTS_JOINED_BY.join(part.text for part in text)
        return {"role": self.role, "content": text, "name": self.name}


class ChatCompletionRequest(SamplingBody):
    """An answer to a conversation."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SamplingBody.unsupported,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
        "store": (False,),
        "web_search_options": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "service_tier": ("auto", "default"),
        # vLLM's
        "documents": ([],),
        "chat_template": (),
        "echo": (False,),
        "include_reasoning": (True, False),
        "best_of": (1,),
    }

    messages: list[Message] = Field(
        min_length=1, fail_fast=True, description="The conversation so far, oldest turn first."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Most tokens to generate (default: as many as fit the context)."
    )
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens, which wins.")
    logprobs: bool = Field(False, description="Log-probabilities of the tokens.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Alternatives for each token; needs `logprobs`."
    )
    add_generation_prompt: bool | None = Field(
        None, description="End the prompt with what begins an answer (default: yes, unless continue_final_message)."
    )
    continue_final_message: bool = Field(False, description="Go on with the last message instead of a new one.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="More variables for the chat template.")
    add_special_tokens: bool = Field(
        False, description="Let the tokenizer add its special tokens to those that the chat template writes."
    )
    metadata: dict[str, str] | None = Field(None, description="Taken and not used.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        self.check_together()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
        return self

    @property
    def limit(self) -> tuple[str, int | None]:
        """The field that says how many tokens may be generated, and its value."""
        if self.max_completion_tokens is None and self.max_tokens is not None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """For each generated token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


def chat_head(request_id: str, created: int, model: str, *, stream: bool) -> dict[str, Any]:
    """What the answer or every chunk of a stream begins with; `created` in seconds since 1970."""
    kind = "chat.completion.chunk" if stream else "chat.completion"
    return {"id": f"chatcmpl-{request_id}", "object": kind, "created": created, "model": model}


def chat_choice(
    index: int,
    content: str,
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
    stop_reason: int | str | None,
) -> dict[str, Any]:
    """An entry of `choices` of a whole answer; `stop_reason` is the stop token or text that ended it."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": content, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


def chat_chunk(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    """An entry of `choices` of a stream."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class ChatTop(BaseModel):
    """A token that could have come."""

    token: str = Field(description=r"Its text; `bytes:\xe2` for a token that is no text by itself.")
    logprob: float = Field(description="Natural logarithm; -9999 stands for minus infinity.")
    bytes: list[int] = Field(description="The bytes it stands for.")


class ChatToken(ChatTop):
    """A token that came."""

    top_logprobs: list[ChatTop] = Field(description="The most probable tokens, best first.")


class ChatLogprobs(BaseModel):
    """A row for each token."""

    content: list[ChatToken]
    refusal: None


class ChatMessage(BaseModel):
    """The answer's text."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = Field(description="The stop token or text that ended it.")
    token_ids: list[int] | None = Field(None, description="With return_token_ids.")


class ChatCompletionResponse(BaseModel):
    """The answer; it documents the dicts above and is never built."""

    id: str = Field(examples=["chatcmpl-4f1c"])
    object: Literal["chat.completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | None = Field(None, description="As in completions.")
    prompt_token_ids: list[int] | None = Field(None, description="With return_token_ids.")
