"""What completions and chats do alike: their sequences on the engine, what came of them, and the tokens they used."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from server.engine.async_engine import AsyncEngine
from server.engine.detokenizer import unfinished_bytes
from server.engine.request import Choices, Completion, Logprobs, Request, RequestOutput, SamplingParams
from server.protocol.sampling import SamplingBody, usage
from server.routes.limits import check_alternatives
from server.routes.prompts import LONG_TEXT, MANY, Prompt
from server.routes.respond import deadline_of
from server.settings import Settings


@dataclass
class Generation:
    """A checked request that runs; sequence c of prompt p has index p · width + c."""

    engine: AsyncEngine
    body: SamplingBody
    prompts: list[Prompt]
    width: int  # sequences of a prompt
    params: SamplingParams
    request_id: str
    deadline: float | None  # on the event loop's clock
    prompt_scores: dict[int, Logprobs] = field(default_factory=dict)  # by prompt, once its first output has come
    cached_tokens: dict[int, int] = field(default_factory=dict)  # by prompt
    completion_tokens: int = 0

    async def run(self) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """(index, output) of every sequence as they come. A prompt's first sequence is the first to say anything, so
        that `prompt_scores` is there when it does."""
        async with aclosing(self.engine.generate(self._requests(), self.deadline)) as outputs:
            async for index, output in outputs:
                prompt = index // self.width
                self.completion_tokens += len(output.token_ids)
                self.cached_tokens.setdefault(prompt, output.num_cached_tokens)
                if output.prompt_logprobs is not None:
                    self.prompt_scores[prompt] = output.prompt_logprobs
                yield index, output

    def _requests(self) -> Iterator[Request]:
        """Choices above 0 are followers of choice 0 of the same prompt and share its prefill."""
        unique = f"{self.request_id}-{secrets.token_hex(4)}"  # clients may send an x-request-id twice
        plain = self.params.without_prompt_logprobs()
        for number, prompt in enumerate(self.prompts):
            leader: Request | None = None
            choices = Choices(self.width)
            for choice in range(self.width):
                request = Request(
                    f"{unique}-{number * self.width + choice}",
                    prompt.token_ids,
                    plain if choice else self.params,
                    choice=choice,
                    priority=self.body.priority,
                    cache_salt=self.body.cache_salt or "",
                    leader=leader,
                    group=unique,
                    choices=choices,
                )
                leader = leader or request
                yield request

    async def collect(self) -> list[Completion]:
        """Every sequence to its end, by index."""
        done = [Completion() for _ in range(len(self.prompts) * self.width)]
        async with aclosing(self.run()) as outputs:
            async for index, output in outputs:
                done[index].add(output)
        return done

    def answer_size(self) -> int:
        """About the values in a whole answer."""
        generated = self.completion_tokens * (1 + (self.params.logprobs or 0))
        prompts = sum(len(prompt.token_ids) for prompt in self.prompts) * (1 + (self.params.prompt_logprobs or 0))
        return 8 * len(self.prompts) * self.width + generated + prompts

    def prompt_text(self, prompt: int) -> str:
        """A prompt as echo shows it: what its completion goes on with. A character that its last tokens begin belongs
        to the completion."""
        text, ids = self.prompts[prompt].text, self.prompts[prompt].token_ids
        if text is None:
            text = self.engine.tokenizer.decode(ids, skip_special_tokens=False)
            if unfinished_bytes(self.engine.tokenizer, ids):
                text = text.removesuffix("\ufffd")
        return text

    @property
    def sends_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        options = self.body.stream_options
        return options is not None and options.include_usage

    @property
    def counts_in_chunks(self) -> bool:
        """Whether each chunk of a stream says what has been used so far."""
        options = self.body.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    def chunk_usage(self, unsent: int = 0) -> dict[str, Any]:
        """The field `usage` of a chunk, if chunks have one: null, or what has been used so far but for `unsent`
        tokens, which come in a later chunk."""
        return {"usage": self.usage(unsent) if self.counts_in_chunks else None} if self.sends_usage else {}

    def usage(self, unsent: int = 0) -> dict[str, Any]:
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        return usage(prompt_tokens, self.completion_tokens - unsent, sum(self.cached_tokens.values()))


async def begin(
    engine: AsyncEngine,
    settings: Settings,
    body: SamplingBody,
    prompts: list[Prompt],
    request_id: str,
    *,
    width: int,
    params: SamplingParams,
    limit_field: str = "max_tokens",
) -> Generation:
    """Refuse what the model cannot do; `limit_field` says how many tokens may be generated.

    Raises:
        ContextLength, InvalidRequest: as `AsyncEngine.validate`, or the grammar cannot be compiled, or the answer would
            have too many alternatives.
    """
    check_alternatives([len(prompt.token_ids) for prompt in prompts], width, params, limit_field)

    def validate() -> None:
        for prompt in prompts:
            engine.validate(prompt.token_ids, params.max_tokens, prompt.where, limit_field)

    if len(prompts) > MANY or sum(len(prompt.token_ids) for prompt in prompts) > LONG_TEXT:
        await asyncio.to_thread(validate)
    else:
        validate()
    if params.grammar is not None:
        await engine.compile_grammar(params.grammar)
    return Generation(engine, body, prompts, width, params, request_id, deadline_of(settings))
