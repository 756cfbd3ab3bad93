"""In float32 a text's log-probabilities are the same to the bit, alone and in any company, however it is cut up."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from server.engine.request import Request, SamplingParams
from tests.test_engine import make_engine, prompt

TEXTS = [prompt(seed, length) for seed, length in [(1, 120), (2, 65), (3, 64), (4, 9), (5, 2), (6, 100), (7, 127)]]


def scores(requests: list[Request], engine: Any) -> dict[str, list[float]]:
    """Log-probabilities of the prompts by request id."""
    found: dict[str, list[float]] = {}
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            if output.prompt_logprobs is not None:
                found[output.request_id] = output.prompt_logprobs.logprobs
    return found


def scoring(name: str, ids: list[int], first: int = 0) -> Request:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, first_logit_position=first)
    return Request(name, ids, params)


@pytest.fixture
def alone(tiny_checkpoint: Path) -> list[list[float]]:
    """Each text by itself, in one piece."""
    engine = make_engine(tiny_checkpoint, enable_prefix_caching=False)
    return [scores([scoring("x", ids)], engine)["x"] for ids in TEXTS]


@pytest.mark.parametrize("layout", ["latent", "mixed", "full"])
@pytest.mark.parametrize("budget", [5, 17, 64, 200, 2048])
def test_scores_do_not_depend_on_chunks_or_company(
    tiny_checkpoint: Path, alone: list[list[float]], layout: str, budget: int
) -> None:
    engine = make_engine(
        tiny_checkpoint, max_num_batched_tokens=budget, enable_prefix_caching=False, kv_cache_layout=layout
    )
    singles = [scores([scoring("x", ids)], engine)["x"] for ids in TEXTS]
    assert all(len(single) == len(ids) - 1 for single, ids in zip(singles, TEXTS, strict=True))
    streams = [
        Request(
            f"s{i}", prompt(20 + i, 5 + 7 * i), SamplingParams(max_tokens=40, temperature=1, seed=i, ignore_eos=True)
        )
        for i in range(4)
    ]
    together = scores([*streams, *(scoring(f"t{i}", ids) for i, ids in enumerate(TEXTS))], engine)
    assert [together[f"t{i}"] for i in range(len(TEXTS))] == singles
    if layout == engine.runner.model.config.default_cache_layout():
        assert singles == alone


def test_scores_do_not_depend_on_prefix_hits(tiny_checkpoint: Path, alone: list[list[float]]) -> None:
    engine = make_engine(tiny_checkpoint, block_size=16)
    for ids, expected in zip(TEXTS, alone, strict=True):
        scores([scoring("all", ids)], engine)
        rng = random.Random(len(ids))
        for first in [rng.randrange(len(ids) - 1) for _ in range(4)]:
            found = scores([scoring("late", ids, first)], engine)["late"]
            assert found == expected[first:]
    assert engine.take_stats().prefix_cache_hits > 0
