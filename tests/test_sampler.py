"""Sampling as a pure function of logits and per-row parameters."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.sampler import SamplingRow, sample, score, uniform


def row(uniform: float, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> SamplingRow:
    return SamplingRow(temperature, top_p, top_k, uniform)


def allowed(logits: list[float], temperature: float, top_p: float, top_k: int) -> dict[int, float]:
    """The distribution by definition, in Python floats: sort, cut, renormalise."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[: top_k or None]
    total, kept, mass = sum(weights[i] for i in order), {}, 0.0
    for i in order:
        if mass >= top_p * total:
            break
        kept[i] = weights[i]
        mass += weights[i]
    return {i: w / mass for i, w in kept.items()}


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1, 1, 0), (0.5, 1, 0), (1, 0.7, 0), (2, 0.8, 5), (1, 1, 2)]
)
def test_frequencies_follow_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    draws = 4000
    rows = [row((i + 0.5) / draws, temperature, top_p, top_k) for i in range(draws)]
    counts = Counter(sample(logits.expand(draws, -1), rows))
    expected = allowed(logits.tolist(), temperature, top_p, top_k)
    assert set(counts) <= set(expected)
    for token, probability in expected.items():
        assert counts[token] / draws == pytest.approx(probability, abs=1.5 / draws)


def test_top_p_beyond_the_first_candidates() -> None:
    logits = torch.zeros(1, 1000)
    assert len({*sample(logits.expand(500, -1), [row(i / 500, top_p=0.9) for i in range(500)])}) == 500
    (last,) = sample(logits, [row(0.9999999, top_p=0.9)])
    (first,) = sample(logits, [row(0.0, top_p=0.9)])
    assert first != last


def test_temperature_zero_is_the_maximum_and_mixes_with_others() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    rows = [SamplingRow(0.0, 1.0, 0, 0.0), row(0.3), SamplingRow(0.0, 1.0, 0, 0.0), row(0.3, top_k=1)] + [row(0.9)] * 2
    tokens = sample(logits, rows)
    best = logits.argmax(-1).tolist()
    assert [tokens[i] for i in (0, 2, 3)] == [best[i] for i in (0, 2, 3)]


def test_tiny_temperatures_stay_finite() -> None:
    logits = torch.tensor([[1.0, 300.0, -40.0]])
    assert sample(logits, [row(0.5, temperature=1e-30)]) == [1]


def test_banned_tokens_are_never_chosen() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    assert sample(logits, [SamplingRow(0.0, 1.0, 0, 0.0, banned=(0,))]) == [1]
    assert sample(logits, [SamplingRow(1.0, 1.0, 0, 0.0, banned=(0, 1))]) == [2]
    assert logits[0, 0] == 5.0


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 200), st.integers(0, 5000), st.floats(0.01, 1), st.integers(0, 60))
def test_a_draw_is_always_an_allowed_token(seed: int, choice: int, position: int, top_p: float, top_k: int) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(position)) * 3
    (token,) = sample(logits, [row(uniform(seed, choice, position), 1.0, top_p, top_k)])
    probabilities = logits[0].double().softmax(-1)
    better = probabilities[probabilities > probabilities[token]]
    assert not top_k or len(better) < top_k
    assert float(better.sum()) <= top_p + 1e-6


def test_uniform_is_stateless_and_even() -> None:
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    assert len({uniform(s, c, p) for s in range(5) for c in range(5) for p in range(5)}) == 125
    numbers = [uniform(9, 0, p) for p in range(4000)]
    assert all(0 <= u < 1 for u in numbers)
    assert sum(numbers) / 4000 == pytest.approx(0.5, abs=0.02)


def test_scores() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 5.0]])
    columns = score(logits, torch.tensor([2, 3]), 2)
    norm = math.log(sum(math.exp(x) for x in (1.0, 3.0, 2.0, 3.0)))
    assert columns.logprobs[0] == pytest.approx(2.0 - norm, abs=1e-6)
    assert columns.ranks == [3, 1]
    assert sorted(columns.top_ids[0]) == [1, 3]
    assert columns.top_ids[1][0] == 3
    assert columns.top_logprobs[1][0] == columns.logprobs[1]  # the very same number
    assert score(logits, torch.tensor([1, 0]), 0).top_ids == [[], []]
