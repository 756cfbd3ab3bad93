"""Ways to have a text scored over HTTP; each is checked to have scored every token but the first."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

from server.bench.load import Send, Timing
from server.client import Client

ScoreApi = Literal["echo", "prompt_logprobs", "perplexity"]


def score_text(api: ScoreApi, model: str) -> Send:
    """`echo`: completions with echo and logprobs, as lm-evaluation-harness asks. `prompt_logprobs`: vLLM's parameter,
    without alternatives. `perplexity`: this server's own route."""

    async def send(client: Client, text: list[int], timing: Timing) -> Callable[[], None]:
        body: dict[str, Any] = {"model": model}
        if api == "perplexity":
            path = "/v1/perplexity"
            body |= {"input": text, "method": "full"}
        else:
            path = "/v1/completions"
            body |= {"prompt": text, "max_tokens": 1, "temperature": 0}
            body |= {"echo": True, "logprobs": 1} if api == "echo" else {"prompt_logprobs": 0}
        answer = await client.fetch("POST", path, body)

        def read() -> None:
            count, timing.nll = _count_and_nll(api, json.loads(answer), text)
            if count != len(text) - 1:
                raise ValueError(f"{count} tokens of {len(text)} were scored")

        return read

    return send


def _count_and_nll(api: ScoreApi, answer: Any, text: list[int]) -> tuple[int, float]:
    if api == "perplexity":
        return answer["data"][0]["num_tokens"], answer["data"][0]["nll_sum"]
    choice = answer["choices"][0]
    if api == "echo":
        logprobs = choice["logprobs"]["token_logprobs"][1 : len(text)]
    else:
        entries = zip(choice["prompt_logprobs"][1:], text[1:], strict=True)
        logprobs = [entry[str(token)]["logprob"] for entry, token in entries]
    return len(logprobs), -sum(logprobs)
