"""lm-evaluation-harness on a running server: the harness' own command line with one more model, `lpa`.

    python -m server.lm_eval run --model lpa --model_args base_url=http://127.0.0.1:8000 --tasks TASK

Rolling log-likelihoods go to /v1/perplexity through one connection, the alternatives of each context as a line to
/v1/loglikelihood through another, generations to /v1/completions. The server tokenizes. Numbers are those of the
harness' `hf` on the same weights with the same max_length.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from server.client import Client, RequestFailed
from server.scoring.remote import lines_of, score_texts
from server.scoring.texts import Source

R = TypeVar("R")

PER_REQUEST = 256  # prompts
IN_FLIGHT = 2  # requests: one is computed while another is sent or read
GENERATED = 256  # tokens, where a task does not say: as the harness' own models


@register_model("lpa")
class ServedLM(LM):  # type: ignore[misc]  # the harness has no types
    """A model that `lpa serve` has loaded."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        model: str | None = None,
        api_key: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = GENERATED,
        add_bos_token: bool = False,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        """
        Args:
            base_url: the server's root, with or without /v1.
            model: name (default: the first that the server lists).
            api_key: the server's key, if it wants one.
            max_length: most tokens that are fed at once, as of the harness' local models (default: one less than the
                server's context, which counts the token that is predicted, too).
            max_gen_toks: tokens generated where a task does not say.
            add_bos_token: whether BOS stands before contexts and prompts.
            batch_size, max_batch_size, device: the harness gives them to every model; the server has its own.

        Raises:
            server.client.RequestFailed, ValueError: there is no such server, or max_length is beyond its context.
        """
        super().__init__()
        self._url, self._key, self._add_bos = base_url, api_key, add_bos_token
        self._max_gen_toks = max_gen_toks

        async def first(client: Client) -> dict[str, Any]:
            cards: list[dict[str, Any]] = (await client.json("GET", "/v1/models"))["data"]
            return next((card for card in cards if card["id"] == model), cards[0])

        card = self._run(first)
        self._model = card["id"] if model is None else model
        most = card["max_model_len"] - 1
        if max_length is not None and not 1 <= max_length <= most:
            raise ValueError(
                f"max_length: {max_length} is not between 1 and {most}, one less than the server's context"
            )
        self._max_length = most if max_length is None else max_length
        self._is_shortened = self._max_length < most

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding gives it) of each continuation."""
        pairs = [request.args for request in requests]
        sets = [list(same) for _, same in groupby(pairs, key=itemgetter(0))]
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="loglikelihood") as bar:
            found = self._run(lambda client: self._score_sets(client, sets, bar.update)) if sets else []
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text."""
        found = {i: 0.0 for i, request in enumerate(requests) if not request.args[0]}
        texts = [(i, request.args[0]) for i, request in enumerate(requests) if i not in found]
        asked = {"model": self._model, "method": "rolling", "max_length": self._max_length + 1}
        with tqdm(total=len(texts), disable=disable_tqdm, desc="loglikelihood_rolling") as bar:
            sources = ((Source("document", i, 0), text) for i, text in texts)
            if texts:
                for line in score_texts(self._url, self._key, asked, sources, lambda size, tokens: None):
                    if line["object"] == "perplexity.text":
                        found[line["line"]] = -line["nll_sum"]
                        bar.update()
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[i])
        return [found[i] for i in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each prompt."""
        runs = [list(same) for _, same in groupby((request.args for request in requests), key=lambda args: args[1])]
        batches = [run[at : at + PER_REQUEST] for run in runs for at in range(0, len(run), PER_REQUEST)]
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            found = self._run(lambda client: self._generate_all(client, batches, bar.update))
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return found

    # --- requests ----------------------------------------------------------------------------------------------------

    def _run(self, work: Callable[[Client], Coroutine[Any, Any, R]]) -> R:
        """What `work` returns, with a client of its own."""

        async def with_client() -> R:
            client = Client(self._url, api_key=self._key)
            try:
                return await work(client)
            finally:
                await client.close()

        return asyncio.run(with_client())

    async def _score_sets(
        self, client: Client, sets: list[list[tuple[str, str]]], advance: Callable[[int], object]
    ) -> list[tuple[float, bool]]:
        """The answers to pairs of context and continuation, which share their context in each set."""
        asked: list[dict[str, Any]] = []
        for pairs in sets:
            if self._is_shortened:
                asked += [await self._cut(client, *pair) for pair in pairs]
            else:
                asked.append({"context": pairs[0][0], "continuations": [continuation for _, continuation in pairs]})
        found = await self._loglikelihood(client, asked, advance)
        flat = [pair for pairs in sets for pair in pairs]
        for i, entry in enumerate(found):
            if "error" in entry and entry["error"]["code"] == "context_length_exceeded":
                (found[i],) = await self._loglikelihood(client, [await self._cut(client, *flat[i])], int)
            if "error" in found[i]:
                raise ValueError(found[i]["error"]["message"])
        return [(entry["logprob"], entry["is_greedy"]) for entry in found]

    async def _loglikelihood(
        self, client: Client, sets: list[dict[str, Any]], advance: Callable[[int], object]
    ) -> list[dict[str, Any]]:
        """The answers' continuations; `advance` is told how many have come."""
        query = {"model": self._model, "add_bos": json.dumps(self._add_bos), "stream": "true"}
        lines = (json.dumps(of_set).encode() + b"\n" for of_set in sets)
        found: list[dict[str, Any]] = []
        answer = client.pieces("POST", "/v1/loglikelihood", query=query, lines=lines)
        async with aclosing(lines_of(answer)) as answers:
            async for line in answers:
                entry = json.loads(line)
                if "error" in entry:
                    raise RequestFailed(entry["error"]["message"], entry["error"]["message"])
                found += (continuations := entry.get("continuations", ()))
                advance(len(continuations))
        return found

    async def _cut(self, client: Client, context: str, continuation: str) -> dict[str, Any]:
        """A pair as token ids, from whose beginning so much is cut that it fits, as the harness does."""
        bare = context.rstrip()
        start, whole = await self._tokens(client, bare), await self._tokens(client, context + continuation)
        ids = whole[len(start) :]
        if not bare:
            return {"context": "", "continuations": [ids[-self._max_length :]]}
        own = min(len(ids), self._max_length)
        before = (start + ids)[: len(start) + len(ids) - own]
        kept = before[-(self._max_length + 1 - own - self._add_bos) :]
        return {"context": kept, "continuations": [ids[len(ids) - own :]]}

    async def _tokens(self, client: Client, text: str) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        ids: list[int] = (await client.json("POST", "/tokenize", body))["tokens"]
        return ids

    async def _generate_all(
        self, client: Client, batches: list[list[tuple[str, dict[str, Any]]]], advance: Callable[[int], object]
    ) -> list[str]:
        """What follows the prompts of all batches in order, IN_FLIGHT batches at a time."""
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def one(batch: list[tuple[str, dict[str, Any]]]) -> list[str]:
            async with slots:
                found = await self._generate(client, batch)
            advance(len(found))
            return found

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(batch)) for batch in batches]
        return [text for task in tasks for text in task.result()]

    async def _generate(self, client: Client, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
        """What follows prompts that are generated alike."""
        options: dict[str, Any] = normalize_gen_kwargs(requests[0][1], self._max_gen_toks)
        most = options.pop("max_gen_toks")
        left = self._max_length - most
        if left < 1:
            raise ValueError(f"max_gen_toks: {most} tokens leave nothing of max_length {self._max_length} to prompts")
        options.pop("do_sample", None)
        body = {
            "model": self._model,
            "prompt": [prompt for prompt, _ in requests],
            "max_tokens": most,
            "stop": [text for text in options.pop("until", []) if text],
            "truncate_prompt_tokens": left,
            "add_special_tokens": self._add_bos,
            **options,
        }
        choices: list[dict[str, Any]] = (await client.json("POST", "/v1/completions", body))["choices"]
        return [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]


if __name__ == "__main__":
    cli_evaluate()
