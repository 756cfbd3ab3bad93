"""What completions and chats have in common: how text is generated, and how it is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationInfo

from server.engine.request import SamplingParams
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequest
from server.protocol.body import HARMLESS, RequestBody
from server.protocol.inputs import MODEL
from server.protocol.structured import ResponseFormat, StructuredOutputs, grammar_of

GREEDY_BELOW = 1e-6  # a temperature that would drown float32 logits is greedy
LEAST_TOP_P = 1e-9  # OpenAI allows a top_p of 0: the most probable token alone
INT64 = 2**63
MAX_LOGPROBS = 256

Text = Annotated[str, StringConstraints(min_length=1)]


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _biases(value: Any, info: ValidationInfo) -> Any:
    """JSON keys are texts; the tokens are numbers."""
    if not isinstance(value, dict):
        return value
    wrong = [key for key in value if not (isinstance(key, int) or (key.isascii() and key.isdecimal()))]
    if wrong:
        raise InvalidRequest(f"{info.field_name}: {wrong[0][:40]!r} is not a token id", param=str(info.field_name))
    return {int(key): bias for key, bias in value.items()}


class StreamOptions(RequestBody):
    """What a stream carries beside the text."""

    include_usage: bool = Field(False, description="Send the usage in a last chunk, whose `choices` is empty.")
    continuous_usage_stats: bool = Field(
        False, description="Send the usage so far in every chunk; needs `include_usage`."
    )
    include_obfuscation: bool = Field(False, description="Taken and not used: nothing is padded.")


class SamplingBody(RequestBody):
    """Fields of both endpoints."""

    model_config = ConfigDict(allow_inf_nan=False)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        # vLLM's
        "length_penalty": (1,),
        "use_beam_search": (False,),
        "spaces_between_special_tokens": (True,),
        "logits_processors": ([],),
        "logprob_token_ids": (),
        "prompt_embeds": (),
        "guided_decoding_backend": (),
        # SGLang's
        "stop_regex": ([],),
        "return_hidden_states": (False,),
        # llama.cpp's
        "repeat_penalty": (1,),
        "typical_p": (1,),
        "mirostat": (0,),
        "dry_multiplier": (0,),
        "xtc_probability": (0,),
        "samplers": (),
        # LMDeploy's
        "kwargs": ({},),
        "do_preprocess": (True,),
    }
    harmless: ClassVar[frozenset[str]] = HARMLESS
    aliases: ClassVar[dict[str, str]] = {
        # vLLM's older ones
        "guided_json": "structured_outputs.json",
        "guided_regex": "structured_outputs.regex",
        "guided_choice": "structured_outputs.choice",
        "guided_grammar": "structured_outputs.grammar",
        # SGLang's and llama.cpp's
        "json_schema": "structured_outputs.json",
        "regex": "structured_outputs.regex",
        "ebnf": "structured_outputs.grammar",
        "grammar": "structured_outputs.grammar",
        "no_stop_trim": "include_stop_str_in_output",
        "n_predict": "max_tokens",
        # TGI's and LMDeploy's
        "max_new_tokens": "max_tokens",
        "min_new_tokens": "min_tokens",
    }

    model: str | None = MODEL
    n: int = Field(1, ge=1, le=128, description="Completions for each prompt.")
    stream: bool = Field(False, description="Send the text as server-sent events while it is generated.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    stop: Annotated[list[Text], BeforeValidator(_stops, json_schema_input_type=Text | list[Text])] = Field(
        [],
        max_length=16,
        description="A text or up to 16 that end the completion; they are not part of it.",
        examples=["\n\n"],
    )
    temperature: float = Field(1.0, ge=0, le=2, description="0 always takes the most probable token.")
    top_p: float = Field(1.0, ge=0, le=1, description="Draw from the most probable tokens that sum to this.")
    top_k: int = Field(0, ge=-1, description="Draw from this many most probable tokens; 0 or -1: from all.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Draw only tokens at least this probable, relative to the most probable one."
    )
    seed: int | None = Field(
        None, ge=-INT64, lt=INT64, description="Makes the choice of tokens repeatable (default: a fresh one)."
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken off the logit of every token generated before."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken off a token's logit for each time it was generated before."
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        le=100,
        description="Divides the positive logits and multiplies the negative ones of tokens in prompt or completion.",
    )
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]],
        BeforeValidator(_biases, json_schema_input_type=dict[str, Annotated[float, Field(ge=-100, le=100)]]),
    ] = Field(
        {},
        description="Token id to a number from -100 to 100 that is added to its logit.",
        examples=[{"50": -100}],
    )
    bad_words: list[Text] = Field(
        [], fail_fast=True, description="Texts that are not generated, in the tokens that the tokenizer gives them."
    )
    allowed_token_ids: list[int] | None = Field(
        None, min_length=1, fail_fast=True, description="The only tokens that may be generated (default: all)."
    )
    min_tokens: int = Field(0, ge=0, description="Tokens to generate before the completion may end.")
    ignore_eos: bool = Field(False, description="Generate beyond the end of the text.")
    stop_token_ids: list[int] = Field([], fail_fast=True, description="Tokens that end the completion.")
    include_stop_str_in_output: bool = Field(False, description="Leave the text or token that ended it in the answer.")
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")
    response_format: ResponseFormat | None = Field(None, description="Form of the text, as OpenAI's chats have it.")
    structured_outputs: StructuredOutputs | None = Field(None, description="Form of the text, as vLLM has it.")
    prompt_logprobs: int | None = Field(
        None,
        ge=-1,
        le=MAX_LOGPROBS,
        description="Log-probabilities of the prompt's tokens, with so many alternatives for each, -1: all tokens; not "
        "with `stream`.",
    )
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        description="Keep only so many of the prompt's tokens, at least 1; -1: as many as fit the context.",
        json_schema_extra={"not": {"const": 0}},
    )
    truncation_side: Literal["left", "right"] = Field(
        "left", description="Where truncate_prompt_tokens cuts: left keeps a prompt's last tokens, right its first."
    )
    return_tokens_as_token_ids: bool = Field(
        False, description="Name the tokens of log-probabilities by their ids, as token_id:5."
    )
    return_token_ids: bool = Field(False, description="Add `prompt_token_ids` and `token_ids` to the answer.")
    priority: int = Field(0, ge=-INT64, lt=INT64, description="Requests with a smaller number go first.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=1024, description="Share cached prompts only with requests of the same salt."
    )

    def check_together(self) -> None:
        """Refuse combinations of the common fields."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options: needs stream to be true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs: does not go with stream", param="prompt_logprobs")
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequest("truncate_prompt_tokens: must be -1 or at least 1", param="truncate_prompt_tokens")
        grammar_of(self.response_format, self.structured_outputs)

    def take_all(self, vocab_size: int) -> None:
        """Write the -1 of alternatives, which is for all tokens, as their number."""
        for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
            if getattr(self, name, None) == -1:
                setattr(self, name, vocab_size)

    def sampling_params(
        self,
        tokenizer: Tokenizer,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
        defaults: Mapping[str, float],
    ) -> SamplingParams:
        """How one sequence is generated, with so many alternatives for its tokens and those of its prompt.

        `defaults` has values for fields that the request does not have, in the place of the documented ones.

        Raises:
            InvalidRequest: a token id is outside the vocabulary, or min_tokens is more than max_tokens.
        """
        if self.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens: {self.min_tokens} is more than the {max_tokens} tokens that may be generated",
                param="min_tokens",
            )
        given = {
            name: getattr(self, name) if name in self.model_fields_set else defaults.get(name, getattr(self, name))
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        }
        allowed = self.allowed_token_ids
        for field, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", allowed or ()),
            ("logit_bias", self.logit_bias),
        ):
            if wrong := [token for token in ids if not 0 <= token < tokenizer.vocab_size]:
                raise InvalidRequest(
                    f"{field}: {wrong[0]} is outside the vocabulary of {tokenizer.vocab_size}", param=field
                )
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=given["temperature"] if given["temperature"] >= GREEDY_BELOW else 0.0,
            top_p=max(given["top_p"], LEAST_TOP_P),
            top_k=min(
                max(given["top_k"], 0), tokenizer.vocab_size
            ),  # a number that no tensor holds would fail the step
            min_p=given["min_p"],
            repetition_penalty=given["repetition_penalty"],
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            allowed_token_ids=None if allowed is None else tuple(sorted(set(allowed))),
            bad_words=_bad_words(tokenizer, self.bad_words),
            grammar=grammar_of(self.response_format, self.structured_outputs),
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def _bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """A word's tokens at the beginning of a text and after a space, as vLLM takes them."""
    forms = (form for word in words for form in (word, f" {word.lstrip()}"))
    ids = [tuple(tokenizer.encode(form, add_special_tokens=False)) for form in forms]
    for banned in ids:
        tokenizer.check(banned, "bad_words")
    return tuple(dict.fromkeys(i for i in ids if i))


FINGERPRINT: Any = Field(
    description="Version, weights, dtype and backend: while it is the same, a seed gives the same text.",
    examples=["lpa-0.1.0-3f2a9c1be07d-cpu-avx2-float32"],
)


class PromptTokensDetails(BaseModel):
    """Where prompt tokens came from."""

    cached_tokens: int = Field(description="Prompt tokens that were found in the prefix cache.")


class Usage(BaseModel):
    """Tokens of the request; it documents the dict below and is never built."""

    prompt_tokens: int = Field(description="Each prompt counts once, for any n.")
    completion_tokens: int = Field(description="Of all completions, those that best_of dropped included.")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Tokens of the request: each prompt once, for any n; completions summed."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
