"""Continuations of shared contexts, with the prefix cache and without it."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import Any

from server.bench.client import Client
from server.bench.local import local_server
from server.settings import Settings


def bench_loglikelihood(
    settings: Settings, *, sets: int, context_len: int, continuations: int, continuation_len: int, rounds: int
) -> dict[str, Any]:
    """Score sets of `continuations` after one context each, in turn by a server that shares contexts and by one that
    does not; contexts and continuations are random tokens, new ones every round. A first round does not count.

    `speedup` is how many times faster sharing is, round by round: median, lowest and highest. `cached` is the part of
    all tokens that came from the cache, `bound` the part of them that sharing whole contexts could save at most, as a
    speedup. `difference` is the largest one between the two servers' sums of log-probabilities, in nats.

    Raises:
        ValueError, OSError, RequestFailed: a server did not start or refused.
    """
    with (
        local_server(settings.model_copy(update={"enable_prefix_caching": True})) as on,
        local_server(settings.model_copy(update={"enable_prefix_caching": False})) as off,
    ):
        vocab = on.server.engine.model_config.vocab_size
        bodies = [
            {
                "model": settings.model_name,
                "sets": _sets(f"{i}", vocab, sets, context_len, continuations, continuation_len),
            }
            for i in range(rounds + 1)
        ]
        answers = asyncio.run(_measure([on.url, off.url], bodies))
    speedups = [without / shared for (shared, _), (without, _) in answers[1:]]
    last = [answer for _, answer in answers[-1]]
    usage = last[0]["usage"]
    sums = [[c["logprob"] for entry in answer["data"] for c in entry["continuations"]] for answer in last]
    tokens = continuations * (context_len + continuation_len)
    return {
        "sets": sets,
        "context_len": context_len,
        "continuations": continuations,
        "continuation_len": continuation_len,
        "shared_s": [shared for (shared, _), _ in answers[1:]],
        "without_s": [without for _, (without, _) in answers[1:]],
        "speedup": {"median": statistics.median(speedups), "low": min(speedups), "high": max(speedups)},
        "bound": tokens / (context_len + continuations * continuation_len),
        "cached": usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"],
        "difference": max(abs(a - b) for a, b in zip(*sums, strict=True)),
    }


def _sets(
    seed: str, vocab: int, sets: int, context_len: int, continuations: int, continuation_len: int
) -> list[dict[str, Any]]:
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(count)]

    return [
        {"context": ids(context_len), "continuations": [ids(continuation_len) for _ in range(continuations)]}
        for _ in range(sets)
    ]


async def _measure(urls: list[str], bodies: list[dict[str, Any]]) -> list[list[tuple[float, Any]]]:
    """For each body, (seconds, answer) of each server; who goes first changes from round to round."""
    clients = [Client(url) for url in urls]
    found: list[list[tuple[float, Any]]] = []
    for number, body in enumerate(bodies):
        of_round: dict[int, tuple[float, Any]] = {}
        for i in sorted(range(len(clients)), reverse=bool(number % 2)):
            began = time.perf_counter()
            answer = await clients[i].json("POST", "/v1/loglikelihood", body)
            of_round[i] = (time.perf_counter() - began, answer)
        found.append([of_round[i] for i in range(len(clients))])
    for client in clients:
        await client.close()
    return found
