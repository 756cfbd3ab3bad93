"""What each sampling feature adds to a step of many streams: the same engine and prompts, one feature after another."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from server.engine.engine import Engine, build_engine
from server.engine.request import GrammarSpec, Request, SamplingParams
from server.settings import load_settings

WARM_STEPS = 2  # after the last prompt is through
PLAIN = "greedy"
# a thousand records, so that no stream ends while it is measured
SCHEMA = """{"type": "array", "minItems": 1000, "items": {"type": "object", "required": ["name", "age", "tags"],
"additionalProperties": false, "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"},
"tags": {"type": "array", "items": {"enum": ["sea", "shore", "gull"]}, "maxItems": 3}}}}"""


def features(vocab_size: int, max_tokens: int) -> dict[str, tuple[SamplingParams, SamplingParams]]:
    """By name: the parameters of the first stream and those of the others; the first name is the plain step."""
    greedy = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
    drawn = replace(greedy, temperature=1.0)
    bias = tuple((token, 1.0 - token % 3) for token in range(1, vocab_size, max(1, vocab_size // 300)))
    constrained = replace(greedy, grammar=GrammarSpec("json_schema", SCHEMA, "schema"))
    everywhere = {
        PLAIN: greedy,
        "temperature": drawn,
        "top_p 0.9": replace(drawn, top_p=0.9),
        "top_k 50": replace(drawn, top_k=50),
        "min_p 0.05": replace(drawn, min_p=0.05),
        "top_k 50, top_p 0.9, min_p 0.05": replace(drawn, top_k=50, top_p=0.9, min_p=0.05),
        "penalties": replace(greedy, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5),
        "logprobs 5": replace(greedy, logprobs=5),
        f"logit_bias of {len(bias)} tokens": replace(greedy, logit_bias=bias),
    }
    return {name: (params, params) for name, params in everywhere.items()} | {
        "JSON schema, one stream": (constrained, greedy),
        "JSON schema, all streams": (constrained, constrained),
    }


def bench_sampling(
    model: Path,
    *,
    streams: int,
    input_len: int,
    steps: int,
    rounds: int,
    dtype: str,
    threads: int | None,
    on_round: Callable[[int], None] = lambda number: None,
) -> list[dict[str, Any]]:
    """A row per feature: `ms` is the median step, `ratio` the median over the rounds of its step to the plain one's,
    `deferred` the share of tokens that waited for a step because a grammar's mask was late.

    Raises:
        CheckpointError, ValueError: the model or an option cannot be used.
    """
    engine = build_engine(model, load_settings(dtype=dtype, threads=threads, max_num_seqs=streams).engine_options())
    longest = input_len + WARM_STEPS + steps + 8
    if longest > engine.max_model_len:
        raise ValueError(f"input_len: {longest} tokens with the steps exceed the context of {engine.max_model_len}")
    rng = random.Random(0)
    vocab = engine.model_config.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(input_len)] for _ in range(streams)]
    variants = list(features(vocab, longest - input_len).items())
    times: dict[str, list[float]] = {name: [] for name, _ in variants}
    deferred: dict[str, list[float]] = {name: [] for name, _ in variants}
    for number in range(rounds + 1):
        on_round(number)
        for name, (first, others) in variants[number % len(variants) :] + variants[: number % len(variants)]:
            step, missing = step_time(engine, prompts, first, others, steps)
            if number:  # before that, caches fill and code warms
                times[name].append(step)
                deferred[name].append(missing)
    return [
        {
            "feature": name,
            "ms": 1e3 * statistics.median(found),
            "ratio": statistics.median(mine / plain for mine, plain in zip(found, times[PLAIN], strict=True)),
            "deferred": statistics.mean(deferred[name]),
        }
        for name, found in times.items()
    ]


def step_time(
    engine: Engine, prompts: list[list[int]], first: SamplingParams, others: SamplingParams, steps: int
) -> tuple[float, float]:
    """Median seconds of steps in which all streams decode, and the share of the tokens that they did not give."""
    requests = [Request(f"r{i}", ids, others if i else first) for i, ids in enumerate(prompts)]
    for request in requests:
        engine.add_request(request)
    while min(request.num_output_tokens for request in requests) < WARM_STEPS:
        engine.step()
    found, tokens = [], 0
    for _ in range(steps):
        began = time.perf_counter()
        tokens += len(engine.step())
        found.append(time.perf_counter() - began)
    engine.abort_all()
    return statistics.median(found), 1 - tokens / (steps * len(requests))


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("sampling", no_wrap=True)
    table.add_column("step, ms", justify="right")
    table.add_column(f"to {PLAIN}", justify="right")
    table.add_column("tokens deferred", justify="right")
    for row in rows:
        table.add_row(row["feature"], f"{row['ms']:.2f}", f"{row['ratio']:.3f}", f"{row['deferred']:.1%}")
    Console().print(table)
