"""A fixed number of requests at one server, by concurrency or by rate, each timed; and statistics of the times."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.client import Client, RequestFailed

QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass
class Timing:
    """One request: times in seconds since its start."""

    input_tokens: int
    output_tokens: int = 0
    first: float | None = None  # time to first token
    gaps: list[float] = field(default_factory=list)  # between the pieces of a streamed answer
    total: float = 0.0
    nll: float = 0.0  # of a scored text, nats
    error: str | None = None


Send = Callable[[Client, list[int], Timing], Coroutine[Any, Any, Callable[[], None]]]
"""Sends one prompt and awaits its answer; what it returns reads that into the Timing, when no server is measured."""

FAILURES = (RequestFailed, OSError, ValueError, KeyError, TypeError, IndexError)


@dataclass(frozen=True, kw_only=True)
class Load:
    """How requests come: `concurrency` at a time, or `rate` a second at exponential intervals."""

    requests: int
    concurrency: int
    rate: float | None = None


def prompts(seed: int, round_number: int, count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Random token ids, other ones in every round: no prefix is seen twice."""
    rng = random.Random(f"{seed}:{round_number}")
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


async def run_load(
    client: Client, texts: Sequence[list[int]], load: Load, send: Send, seed: int, on_done: Callable[[Timing], None]
) -> tuple[list[Timing], float]:
    """Send all texts; returns their timings and the seconds from the first request to the last answer."""
    rng = random.Random(seed)
    slots = asyncio.Semaphore(load.concurrency if load.rate is None else len(texts))
    timings: list[Timing] = []
    unread: list[tuple[Timing, Callable[[], None]]] = []

    async def one(text: list[int]) -> None:
        timing = Timing(len(text))
        timings.append(timing)
        started = time.perf_counter()
        try:
            unread.append((timing, await send(client, text, timing)))
        except FAILURES as error:
            timing.error = f"{type(error).__name__}: {error}"
        timing.total = time.perf_counter() - started
        slots.release()
        on_done(timing)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for text in texts:
            if load.rate is not None:
                await asyncio.sleep(rng.expovariate(load.rate))
            await slots.acquire()
            group.create_task(one(text))
    elapsed = time.perf_counter() - started
    for timing, read in unread:
        try:
            read()
        except FAILURES as error:
            timing.error = f"{type(error).__name__}: {error}"
    return timings, elapsed


def summarize(timings: Sequence[Timing], elapsed: float) -> dict[str, Any]:
    """Rates and latencies of the requests that succeeded; latencies in milliseconds."""
    good = [timing for timing in timings if timing.error is None]
    summary: dict[str, Any] = {
        "requests": len(timings),
        "errors": len(timings) - len(good),
        "elapsed_s": elapsed,
        "input_tokens": sum(timing.input_tokens for timing in good),
        "output_tokens": sum(timing.output_tokens for timing in good),
    }
    summary["input_tokens_per_s"] = summary["input_tokens"] / elapsed
    summary["output_tokens_per_s"] = summary["output_tokens"] / elapsed
    latencies = {
        "ttft_ms": [timing.first for timing in good if timing.first is not None],
        "inter_token_ms": [gap for timing in good for gap in timing.gaps],
        "e2e_ms": [timing.total for timing in good],
    }
    for name, values in latencies.items():
        if values:
            summary[name] = {key: 1e3 * quantile(values, q) for key, q in QUANTILES.items()}
    return summary


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which a share q of `values` lies, interpolated."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def mean_nll(timings: Sequence[Timing]) -> float:
    """Nats per scored token, over all texts that have two tokens or more."""
    good = [timing for timing in timings if timing.error is None]
    return math.fsum(t.nll for t in good) / max(1, sum(t.input_tokens - 1 for t in good))
