"""Scores of rows of logits in C against float64, and that a row's depend on nothing but the row."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpa_model.backends.cpu.score import score_rows
from lpa_model.backends.torch.rows import RowScores
from tests.cpu_kernels import DTYPES, ROW_NAMES, guarded, kernels_here

each = pytest.mark.parametrize("name", ROW_NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def scores_of(name: str, logits: Tensor, targets: Tensor, top: int = 0) -> RowScores:
    return score_rows(kernels_here()[name], guarded(logits) if logits.numel() else logits, targets, top)


def before(a: float, i: int, b: float, j: int) -> bool:
    return a > b or (a == b and i < j)


def check(
    logits: list[float], target: int, found: tuple[float, float, float, int, int, list[int], list[float]]
) -> None:
    """Against Python's floats."""
    own, peak, norm, best, rank, top_ids, top_logits = found
    assert own == pytest.approx(logits[target], abs=0, nan_ok=True)
    assert rank == 1 + sum(before(x, i, logits[target], target) for i, x in enumerate(logits))
    if any(map(math.isnan, logits)):
        assert best == next(i for i, x in enumerate(logits) if math.isnan(x))
        assert math.isnan(peak) and math.isnan(norm)
        return
    assert best == min(range(len(logits)), key=lambda i: (-logits[i], i))
    assert peak == logits[best]
    if math.isfinite(peak):
        assert top_ids == sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: len(top_ids)]
        assert top_logits == [logits[i] for i in top_ids]
    if not math.isfinite(peak):
        assert math.isnan(norm)
        return
    below = [x - peak for i, x in enumerate(logits) if i != best]
    # differences are rounded to float32, and once more where multiply-adds are not fused
    rounding = math.fsum(math.exp(x) * (3e-6 + 2**-23 * abs(x)) for x in below if x > -700)
    assert norm == pytest.approx(math.log1p(math.fsum(map(math.exp, below))), rel=0, abs=rounding + 1e-34)


NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 88.0, -88.0, 1e30, -3e38, 3e38, 1e-40, -1e-40]),
    st.integers(-3, 3).map(float),
    st.floats(-30, 30, width=32),
)
ODD = st.sampled_from([math.nan, -math.nan, math.inf, -math.inf])


@given(
    st.sampled_from(ROW_NAMES),
    st.sampled_from(DTYPES),
    st.lists(st.lists(NUMBERS, min_size=1, max_size=70), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 69), ODD), max_size=4),
    st.integers(1, 40),
    st.sampled_from([0, 1, 2, 5, 20, 1000, 1500, 2800]),
    st.randoms(use_true_random=False),
)
def test_scores_of_any_rows(
    name: str,
    dtype: torch.dtype,
    seeds: list[list[float]],
    odd: list[tuple[int, int, float]],
    times: int,
    top: int,
    rng: random.Random,
) -> None:
    """Rows of up to 2800 logits, many of them equal, some of them no numbers."""
    vocab = max(map(len, seeds)) * times
    table = [[rng.choice(seed) if rng.random() < 0.3 else seed[i % len(seed)] for i in range(vocab)] for seed in seeds]
    for i, t, value in odd:
        table[i % len(table)][t * vocab // 70] = value
    logits = torch.tensor(table, dtype=torch.float64).to(dtype)
    targets = torch.tensor([rng.randrange(vocab) for _ in table])
    untouched = logits.clone()
    found = scores_of(name, logits, targets, min(top, vocab))
    assert torch.equal(logits.view(torch.uint8), untouched.view(torch.uint8))
    rows = zip(*(column.tolist() for column in found), strict=True)
    for row, target, numbers in zip(logits.tolist(), targets.tolist(), rows, strict=True):
        check(row, target, numbers)


@each
@each_dtype
@pytest.mark.parametrize("vocab", [1, 31999, 128256])
@pytest.mark.parametrize(("scale", "lead"), [(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (8.0, 0.0), (3.0, 12.0)])
def test_log_probabilities_are_float64s(name: str, dtype: torch.dtype, vocab: int, scale: float, lead: float) -> None:
    """To a millionth, of likely tokens and unlikely ones."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(8, vocab, generator=generator) * scale
    best = logits.argmax(-1)
    logits[torch.arange(8), best] += lead
    targets = torch.where(torch.arange(8) < 4, best, torch.randint(vocab, (8,), generator=generator))
    logits = logits.to(dtype)
    found = scores_of(name, logits, targets)
    exact = logits.double()
    peak, best = exact.max(-1, keepdim=True)
    others = (exact - peak).exp().scatter(1, best, 0.0).sum(-1)
    expected = exact.gather(1, targets[:, None])[:, 0] - peak[:, 0] - others.log1p()
    torch.testing.assert_close(found.own.double() - found.peak - found.norm, expected, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("two_threads")
@each
@each_dtype
def test_a_row_depends_on_nothing_but_itself(name: str, dtype: torch.dtype) -> None:
    """To the bit, whatever the rows beside it, its target, and the number of threads."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(37, 7001, generator=generator) * 3).to(dtype)
    targets = torch.randint(7001, (37,), generator=generator)
    many = [scores_of(name, logits, targets) for _ in range(10)]
    torch.set_num_threads(1)
    alone = [scores_of(name, logits[i : i + 1], targets[i : i + 1]) for i in range(37)]
    for found in many:
        for column, single in zip(found, zip(*alone, strict=True), strict=True):
            assert torch.equal(column, torch.cat(single))
    order = torch.randperm(37, generator=generator)
    for column, whole in zip(scores_of(name, logits[order], targets[order]), many[0], strict=True):
        assert torch.equal(column, whole[order])
    other = scores_of(name, logits, targets.flip(0))
    assert torch.equal(other.norm, many[0].norm) and torch.equal(other.best, many[0].best)


@each
@each_dtype
def test_targets_outside_the_vocabulary(name: str, dtype: torch.dtype) -> None:
    for target in (-1, 5):
        with pytest.raises(IndexError, match="vocabulary of 5"):
            scores_of(name, torch.zeros(2, 5, dtype=dtype), torch.tensor([0, target]))
    assert all(
        len(column) == 0
        for column in scores_of(name, torch.zeros(0, 5, dtype=dtype), torch.zeros(0, dtype=torch.int64))
    )
