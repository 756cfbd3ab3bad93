"""POST /v1/completions: what may be asked, and the answer, built as plain dicts for speed."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from server.engine.request import SamplingParams
from server.errors import InvalidRequest
from server.protocol.body import RequestBody
from server.protocol.inputs import Inputs

GREEDY_BELOW = 1e-6  # a temperature that would drown float32 logits is greedy
INT64 = 2**63


class StreamOptions(RequestBody):
    """What a stream carries beside the text."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"continuous_usage_stats": (False,)}

    include_usage: bool = Field(False, description="Send the usage in a last chunk, whose `choices` is empty.")


class CompletionRequest(RequestBody):
    """Text that continues a prompt."""

    model_config = ConfigDict(allow_inf_nan=False)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "suffix": ("",),
        "logit_bias": ({},),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        # vLLM's
        "min_p": (0,),
        "repetition_penalty": (1,),
        "length_penalty": (1,),
        "use_beam_search": (False,),
        "include_stop_str_in_output": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "bad_words": ([],),
        "allowed_token_ids": (),
        "prompt_logprobs": (),
        "truncate_prompt_tokens": (),
        "add_special_tokens": (True,),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "response_format": ({"type": "text"},),
        "structured_outputs": (),
    }

    model: str = Field(description="Name of the model.", examples=["lpa-tiny"])
    prompt: Inputs = Field(
        description="A text, a list of texts, a list of token ids or a list of lists.", examples=["Once upon a time"]
    )
    max_tokens: int = Field(16, ge=0, description="Most tokens to generate; 0 with echo only returns the prompt.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 always takes the most probable token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the most probable tokens that sum to this.")
    top_k: int = Field(0, ge=-1, description="Draw from this many most probable tokens; 0 or -1: from all.")
    n: int = Field(1, ge=1, le=128, description="Completions for each prompt.")
    best_of: int | None = Field(None, description="Only 1 or n: every completion is returned.")
    stream: bool = Field(False, description="Send the text as server-sent events while it is generated.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Log-probabilities of the tokens, with this many alternatives for each."
    )
    echo: bool = Field(False, description="Begin the answer with the prompt.")
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(
            lambda value: [value] if isinstance(value, str) else value, json_schema_input_type=str | list[str]
        ),
    ] = Field([], max_length=4, description="A text or up to 4 that end the completion; they are not part of it.")
    stop_token_ids: list[int] = Field([], description="Tokens that end the completion.")
    min_tokens: int = Field(0, ge=0, description="Tokens to generate before the completion may end.")
    ignore_eos: bool = Field(False, description="Generate beyond the end of the text.")
    seed: int | None = Field(
        None, ge=-INT64, lt=INT64, description="Makes the choice of tokens repeatable (default: a fresh one)."
    )
    user: str | None = Field(None, description="Taken and not used.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens: 0 needs echo; without it there is nothing to answer", param="max_tokens")
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens: {self.min_tokens} is more than max_tokens {self.max_tokens}", param="min_tokens"
            )
        if self.best_of not in (None, 1, self.n):
            raise InvalidRequest(
                f"best_of: {self.best_of} is not supported; 1 or n = {self.n} is, and returns all", param="best_of"
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options: needs stream to be true", param="stream_options")
        return self

    def to_sampling_params(self, *, prompt_logprobs: int | None = None) -> SamplingParams:
        """How one of the n sequences is generated, with `prompt_logprobs` alternatives for its prompt's tokens."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature if self.temperature >= GREEDY_BELOW else 0.0,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def completion_head(request_id: str, created: int, model: str) -> dict[str, Any]:
    """What the answer and every chunk of a stream begin with; `created` in seconds since 1970."""
    return {"id": f"cmpl-{request_id}", "object": "text_completion", "created": created, "model": model}


def choice(
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


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Tokens of the request: each prompt once, whatever n is; completions summed."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
