"""Rounds of one workload at one server, or alternating between two: ratios of neighbouring rounds cancel drift."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from server.bench.load import Load, Send, Timing, mean_nll, prompts, run_load, summarize
from server.client import Client

MIN_COMPARED_ROUNDS = 5


@dataclass
class Target:
    """A server and how it is asked; `pid` is stopped with its children while the other one is measured."""

    client: Client
    model: str | None  # None: the first one that the server lists
    send: Callable[[str], Send]  # from the model's name
    pid: int | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every round sends: `load` of random prompts of `input_len` tokens below `vocab_size`."""

    load: Load
    input_len: int
    vocab_size: int
    seed: int = 0
    rounds: int = MIN_COMPARED_ROUNDS


def measure(targets: Sequence[Target], workload: Workload, on_done: Callable[[Timing, Target], None]) -> None:
    """Run all rounds; each target's `rounds` get the summaries. A first round is not counted: caches fill, code warms.

    Raises:
        OSError, RequestFailed: a server does not answer GET /v1/models.
        ValueError: a comparison of too few rounds.
    """
    if len(targets) > 1 and workload.rounds < MIN_COMPARED_ROUNDS:
        raise ValueError(f"rounds: a comparison takes {MIN_COMPARED_ROUNDS} or more, not {workload.rounds}")
    uvloop.run(_measure(targets, workload, on_done))  # half of asyncio's own time for each piece that arrives


async def _measure(targets: Sequence[Target], workload: Workload, on_done: Callable[[Timing, Target], None]) -> None:
    try:
        await _take_turns(targets, workload, on_done)
    finally:
        for target in targets:
            await target.client.close()


async def _take_turns(targets: Sequence[Target], workload: Workload, on_done: Callable[[Timing, Target], None]) -> None:
    for target in targets:
        target.model = target.model or await target.client.model_name()
    for number in range(workload.rounds + 1):
        texts = prompts(
            workload.seed, number, workload.load.requests, workload.input_len, workload.vocab_size
        )  # the same for both
        order = list(targets) if number % 2 else list(reversed(targets))
        for target in order:
            assert target.model is not None
            others = [other.pid for other in targets if other is not target and other.pid is not None]

            def done(timing: Timing, target: Target = target) -> None:
                on_done(timing, target)

            with _stopped(others):
                timings, elapsed = await run_load(
                    target.client, texts, workload.load, target.send(target.model), workload.seed, done
                )
            target.errors += [timing.error for timing in timings if timing.error is not None]
            if number:
                target.rounds.append(summarize(timings, elapsed) | {"mean_nll": mean_nll(timings)})


@contextlib.contextmanager
def _stopped(pids: Sequence[int]) -> Iterator[None]:
    """Stop processes and all below them, and continue them in any case."""
    family = [pid for root in pids for pid in (root, *_descendants(root))]
    try:
        for pid in family:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _descendants(pid: int) -> Iterator[int]:
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            yield child
            yield from _descendants(child)


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number over the rounds."""
    names = [name for name in rounds[0] if all(name in summary for summary in rounds)]
    return {
        name: medians([summary[name] for summary in rounds])
        if isinstance(rounds[0][name], dict)
        else statistics.median(summary[name] for summary in rounds)
        for name in names
    }


def ratios(mine: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mine over theirs, round by round, of all rates and of the median latencies: median, lowest and highest."""
    found: dict[str, Any] = {}
    for name in mine[0]:
        pairs = []
        for a, b in zip(mine, theirs, strict=True):
            if name.endswith("_per_s") and b[name]:
                pairs.append(a[name] / b[name])
            elif name.endswith("_ms") and name in a and name in b:
                pairs.append(a[name]["median"] / b[name]["median"])
        if len(pairs) == len(mine):
            found[name] = {"median": statistics.median(pairs), "low": min(pairs), "high": max(pairs), "rounds": pairs}
    return found
