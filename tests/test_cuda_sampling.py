"""Sampling and scoring that stay on the device, against torch's, here on a CPU; and that nothing reads a tensor."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpa_model.backends.base import Mask, SamplingRow, StepResult, uniform
from lpa_model.backends.cuda import logits as cuda_logits
from lpa_model.backends.cuda import sampling as cuda_sampling
from lpa_model.backends.cuda.transfer import Parcel
from lpa_model.backends.torch import rows as torch_rows
from lpa_model.backends.torch.results import ComputedStep, step_result
from lpa_model.batch import Batch, Measured, ScoredRows, Span
from tests.test_sampler import VOCAB, mask_of, row_after
from tests.tiny import tiny_config

CPU, META = torch.device("cpu"), torch.device("meta")
CONFIG = tiny_config()

KEYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_p": 0.6},
    {"top_p": 0.05},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 3},
    {"top_k": 39, "top_p": 0.7},
    {"top_k": 1000},
    {"min_p": 0.4},
    {"logit_bias": ((3, 5.0), (8, -100.0))},
    {"allowed_token_ids": (4, 9, 11), "temperature": 0},
    {"bad_words": ((7,), (3, 5)), "temperature": 0},
    {"repetition_penalty": 1.7, "temperature": 0.9},
    {"frequency_penalty": 0.8, "presence_penalty": -0.4, "top_k": 5},
    {"min_tokens": 9, "temperature": 0},
    {"logprobs": 0},
    {"logprobs": 5, "top_k": 2},
    {"logprobs": 40, "temperature": 0, "allowed_token_ids": (1, 2)},
]


def logits_of(n: int, seed: int, dtype: torch.dtype, step: float = 0.5) -> torch.Tensor:
    """Rounded, so that there are ties; 0.0 beside -0.0."""
    found = (torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3 / step).round() * step
    return found.to(dtype)


def some_rows(rng: random.Random, n: int) -> list[SamplingRow]:
    found = []
    for i in range(n):
        keys = {key: value for kind in rng.sample(KEYS, rng.randint(1, 2)) for key, value in kind.items()}
        generated = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 5))]
        one = row_after(generated, 0.0, **keys)
        found.append(replace(one, row=i, draws=partial(uniform, rng.randrange(99), 0, i), constrained=i % 5 == 0))
    return found


def both(
    logits: torch.Tensor, rows: list[SamplingRow], masks: dict[int, Mask], batch: Batch
) -> tuple[StepResult, StepResult]:
    """What torch says, and what this backend does."""
    expected = step_result(ComputedStep(batch, rows, logits, {}), lambda hidden: hidden, masks, CONFIG)
    found = StepResult([None] * len(rows))

    def head(chosen: torch.Tensor) -> torch.Tensor:
        return logits[chosen]

    able = [i for i, row in enumerate(rows) if not row.constrained or i in masks]
    if able:
        some, theirs = [rows[i] for i in able], [masks.get(i) for i in able]
        sampled = cuda_sampling.sample(head, able, some, theirs, VOCAB, CPU)
        cuda_sampling.finish(sampled, head, VOCAB, CPU, found)
    cuda_sampling.take_scores(cuda_sampling.score_prompt(head, batch, CPU), found)
    return expected, found


def batch_of(n: int, scored: ScoredRows) -> Batch:
    return Batch.build([1] * n, [Span(0, n, range(n), False)], 32, scored=scored)


@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_a_step_equals_torch(seed: int, n: int, dtype: torch.dtype, spoiled: bool) -> None:
    rng = random.Random(seed)
    logits, rows = logits_of(n, seed, dtype), some_rows(rng, n)
    if spoiled:
        for value in (float("nan"), float("inf"), -float("inf")):
            logits[rng.randrange(n), rng.randrange(VOCAB)] = value
        logits[rng.randrange(n)] = -torch.inf
    masks = {
        i: mask_of({rng.randrange(VOCAB) for _ in range(rng.randint(0, 9))})
        for i in range(n)
        if rows[i].constrained and rng.random() < 0.7
    }
    scored = ScoredRows(
        np.array(rng.sample(range(n), n // 2), np.int64),
        np.array([rng.randrange(VOCAB) for _ in range(n // 2)], np.int64),
        np.array([rng.choice([0, 1, 4, VOCAB]) for _ in range(n // 2)], np.int64),
    )
    if n // 2 > 2:
        runs = [(1, Measured(entropy=True)), (n // 2, Measured(mass_of=np.array([3, 7, 9]), rows=True))]
        scored = scored._replace(measured=runs)
    expected, found = both(logits, rows, masks, batch_of(n, scored))
    assert (found.tokens, found.stuck, found.broken) == (expected.tokens, expected.stuck, expected.broken)
    assert found.broken_prompt == expected.broken_prompt
    assert found.scores.keys() == expected.scores.keys()
    for i, theirs in expected.scores.items():
        same_scores(found.scores[i], theirs, spoiled=False)
    same_scores(found.prompt_scores, expected.prompt_scores, spoiled)


def same_scores(found: Any, expected: Any, spoiled: bool) -> None:
    for name, ours, theirs in zip(expected._fields, found, expected, strict=True):
        if name in ("logprobs", "entropies", "masses"):
            assert ours == pytest.approx(theirs, abs=1e-6, nan_ok=True), name
        elif name == "rows":
            assert [row is None for row in ours] == [row is None for row in theirs]
            for a, b in zip(ours, theirs, strict=True):
                assert a is None or np.allclose(a, b, atol=1e-6, equal_nan=True)
        elif not spoiled:
            pairs = zip(ours, theirs, strict=True)
            assert all(pytest.approx(a, abs=1e-6) == b for a, b in pairs), name


@pytest.mark.parametrize("top_p", [0.02, 0.3, 0.9])
def test_rows_with_too_few_numbers_are_drawn_again(top_p: float) -> None:
    rows = [replace(row_after([], 0.0, top_p=top_p), row=i, draws=partial(uniform, 5, 0, i)) for i in range(200)]
    logits = logits_of(1, 3, torch.float32, step=1e-3).expand(200, -1).contiguous()
    again = torch.tensor([cuda_sampling.settings_of(row, cuda_sampling.ATTEMPTS) for row in rows])
    undecided = cuda_logits.draw_tokens(logits, again.double(), None) == torch_rows.UNDECIDED
    assert undecided.any() or top_p > 0.5
    expected, found = both(logits, rows, {}, batch_of(200, ScoredRows(*[np.zeros(0, np.int64)] * 3)))
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("k", [1, 2, 7, VOCAB])
def test_the_best_tokens_are_those_of_a_stable_sort(k: int) -> None:
    logits = logits_of(30, 1, torch.float32, step=2.0)
    logits[:, 5] = -0.0
    logits[3, 9], logits[4, 9], logits[5] = float("inf"), -float("inf"), -torch.inf
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    found, found_ids = cuda_logits.best_tokens(logits, k)
    assert torch.equal(found, values[:, :k]) and torch.equal(found_ids, ids[:, :k])


def test_nothing_waits_for_the_device() -> None:
    """A tensor on `meta` has no numbers: whatever reads one raises."""
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.zeros(3, device=META).nonzero()
    rows = [replace(row_after([3, 3], 0.0, **keys), row=i) for i, keys in enumerate(KEYS)]
    logits = torch.zeros(len(rows), VOCAB, device=META)

    def head(chosen: torch.Tensor) -> torch.Tensor:
        return logits[chosen]

    masks = [mask_of({1, 2}) if i % 3 else None for i in range(len(rows))]
    sampled = cuda_sampling.sample(head, range(len(rows)), rows, masks, VOCAB, META)
    assert len(sampled.scored) == 3
    scored = ScoredRows(
        np.arange(5),
        np.arange(5),
        np.array([0, 1, 2, 3, 3]),
        [(2, Measured(entropy=True)), (5, Measured(mass_of=np.array([1])))],
    )
    step = cuda_sampling.score_prompt(head, batch_of(5, scored), META)
    assert sum(len(chunk.columns) for chunk in step.chunks) == 5


def test_a_parcel_keeps_types_and_shapes() -> None:
    arrays = [
        np.arange(7, dtype=np.uint8).reshape(1, 7),
        np.zeros((0, 4), np.float64),
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.array([2**40, -1]),
    ]
    parcel = Parcel()
    assert [parcel.add(array) for array in arrays] == [0, 1, 2, 3]
    for sent, array in zip(parcel.send(CPU), arrays, strict=True):
        assert np.array_equal(sent.numpy(), array) and sent.numpy().dtype == array.dtype
    assert Parcel().send(CPU) == []
