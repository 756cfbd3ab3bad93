"""Ways to have a text scored over HTTP; each is checked to have scored every token but the first."""

from __future__ import annotations

from typing import Any, Literal

from server.bench.client import Client
from server.bench.load import Send, Timing

ScoreApi = Literal["echo", "prompt_logprobs", "perplexity"]


def score_text(api: ScoreApi, model: str) -> Send:
    """`echo`: completions with echo and logprobs, as lm-evaluation-harness asks. `prompt_logprobs`: vLLM's parameter,
    without alternatives. `perplexity`: this server's own route."""

    async def send(client: Client, text: list[int], timing: Timing) -> None:
        if api == "perplexity":
            body: dict[str, Any] = {"model": model, "input": text, "method": "full"}
            answer = await client.json("POST", "/v1/perplexity", body)
            count, timing.nll = answer["data"][0]["num_tokens"], answer["data"][0]["nll_sum"]
        else:
            body = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0}
            body |= {"echo": True, "logprobs": 1} if api == "echo" else {"prompt_logprobs": 0}
            choice = (await client.json("POST", "/v1/completions", body))["choices"][0]
            if api == "echo":
                logprobs = choice["logprobs"]["token_logprobs"][1 : len(text)]
            else:
                logprobs = [
                    entry[str(token)]["logprob"]
                    for entry, token in zip(choice["prompt_logprobs"][1:], text[1:], strict=True)
                ]
            count, timing.nll = len(logprobs), -sum(logprobs)
        if count != len(text) - 1:
            raise ValueError(f"{count} tokens of {len(text)} were scored")

    return send
