"""POST /tokenize, POST /detokenize and GET /tokenizer_info, with vLLM's names."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.errors import InvalidRequest
from server.protocol.body import HARMLESS, RequestBody
from server.protocol.chat import Message
from server.protocol.inputs import MODEL, check_text
from server.protocol.tools import Tool, check_size

TokenId = Annotated[int, Field(ge=0)]


class TokenizeRequest(RequestBody):
    """A text, or a conversation that the chat template turns into one."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "chat_template": (),  # would run a stranger's program; the server's own is set with --chat-template
        "mm_processor_kwargs": ({},),
    }
    harmless: ClassVar[frozenset[str]] = HARMLESS

    model: str | None = MODEL
    prompt: str | None = Field(None, description="The text; this or `messages`.", examples=["Once upon a time"])
    messages: list[Message] | None = Field(
        None, min_length=1, fail_fast=True, description="The conversation; this or `prompt`."
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Let the tokenizer add its special tokens, such as BOS (default: with `prompt`; a chat template "
        "writes its own).",
    )
    add_generation_prompt: bool | None = Field(
        None, description="Messages: end with what begins an answer (default: unless the last message is continued)."
    )
    continue_final_message: bool = Field(False, description="Messages: leave the last one open.")
    tools: list[Tool] = Field([], fail_fast=True, description="Messages: functions that may be called, as in chats.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="Messages: more variables for the chat template.")
    return_token_strs: bool = Field(False, description="Add the tokens as the vocabulary writes them.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("prompt: either it or messages must be given, and not both", param="prompt")
        check_text(self.prompt or "", "prompt")
        check_size(self.tools)
        return self


class TokenizeResponse(BaseModel):
    """The tokens of the text."""

    count: int = Field(ge=0, description="Number of tokens.")
    max_model_len: int = Field(description="Longest prompt and completion together, in tokens.")
    tokens: list[int] = Field(description="Token ids.", examples=[[51, 40, 37]])
    token_strs: list[str] | None = Field(
        description="As the vocabulary writes them, where `return_token_strs` asks for it; else null."
    )


class DetokenizeRequest(RequestBody):
    """Tokens to be turned into text."""

    harmless: ClassVar[frozenset[str]] = HARMLESS

    model: str | None = MODEL
    tokens: list[TokenId] = Field(
        fail_fast=True, description="Token ids, below the vocabulary's size.", examples=[[51, 40, 37]]
    )


class DetokenizeResponse(BaseModel):
    """The text of the tokens."""

    prompt: str = Field(description="Special tokens written out; bytes that are no UTF-8 are U+FFFD.")


class TokenizerInfo(BaseModel):
    """tokenizer_config.json, with the names that it lacks filled in from what the server does."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str = Field(examples=["PreTrainedTokenizerFast"])
    bos_token: str | None = Field(description="Begins a text; null where the model has none.")
    eos_token: str | None = Field(description="Ends a text.", examples=["<|endoftext|>"])
    pad_token: str | None
    chat_template: str = Field(description="The Jinja template in use.")
    model_max_length: int = Field(description="Tokens of the context, unless tokenizer_config.json says otherwise.")
    vocab_size: int = Field(description="Token ids are below it.")
