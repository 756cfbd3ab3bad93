"""Continuations of shared contexts, computed once and computed for each continuation."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import Any

from server.bench.local import local_server
from server.client import Client
from server.settings import Settings


def bench_loglikelihood(
    settings: Settings, *, sets: int, context_len: int, continuations: int, continuation_len: int, rounds: int
) -> dict[str, Any]:
    """Score sets of `continuations` after one context each, as sets, alternating with the same pairs one by one at a
    server without a prefix cache. Contexts and continuations are random tokens, new ones every round; a first round
    does not count.

    `speedup` is how many times faster the sets are, round by round: median, lowest and highest; `bound` is the ratio
    of tokens. `difference` is the largest one between the sums of log-probabilities, in nats.

    Raises:
        ValueError, OSError, RequestFailed: a server did not start or refused.
    """
    with (
        local_server(settings.model_copy(update={"enable_prefix_caching": True})) as on,
        local_server(settings.model_copy(update={"enable_prefix_caching": False})) as off,
    ):
        vocab = on.server.engine.model_config.vocab_size
        asked = [_sets(f"{i}", vocab, sets, context_len, continuations, continuation_len) for i in range(rounds + 1)]
        answers = asyncio.run(
            _measure(
                [on.url, off.url],
                [
                    [{"model": settings.model_name, "sets": form} for form in (of_round, _one_by_one(of_round))]
                    for of_round in asked
                ],
            )
        )
    shared_s, separate_s = ([of_round[i][0] for of_round in answers[1:]] for i in (0, 1))
    speedups = [separate / shared for shared, separate in zip(shared_s, separate_s, strict=True)]
    shared, separate = (
        [c["logprob"] for entry in answer["data"] for c in entry["continuations"]] for _, answer in answers[-1]
    )
    return {
        "sets": sets,
        "context_len": context_len,
        "continuations": continuations,
        "continuation_len": continuation_len,
        "shared_s": shared_s,
        "separate_s": separate_s,
        "speedup": {"median": statistics.median(speedups), "low": min(speedups), "high": max(speedups)},
        "bound": answers[-1][1][1]["usage"]["prompt_tokens"] / answers[-1][0][1]["usage"]["prompt_tokens"],
        "difference": max(abs(a - b) for a, b in zip(shared, separate, strict=True)),
    }


def _one_by_one(sets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"context": entry["context"], "continuations": [continuation]}
        for entry in sets
        for continuation in entry["continuations"]
    ]


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


async def _measure(urls: list[str], rounds: list[list[dict[str, Any]]]) -> list[list[tuple[float, Any]]]:
    """For each round, (seconds, answer) of each server to its body; their order alternates from round to round."""
    clients = [Client(url) for url in urls]
    found: list[list[tuple[float, Any]]] = []
    try:
        for number, bodies in enumerate(rounds):
            of_round: dict[int, tuple[float, Any]] = {}
            for i in sorted(range(len(clients)), reverse=bool(number % 2)):
                began = time.perf_counter()
                answer = await clients[i].json("POST", "/v1/loglikelihood", bodies[i])
                of_round[i] = (time.perf_counter() - began, answer)
            found.append([of_round[i] for i in range(len(clients))])
    finally:
        for client in clients:
            await client.close()
    return found
