"""Tokens drawn in C against those of plain torch, and masked rows: a row depends on nothing but itself."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpa_model.backends.cpu.sampling import draw_tokens, mask_logits
from lpa_model.backends.torch import rows as torch_rows
from lpa_model.backends.torch.rows import NOTHING, UNDECIDED
from tests.cpu_kernels import DTYPES, ROW_NAMES, guarded, kernels_here

each = pytest.mark.parametrize("name", ROW_NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def tables(rows: int, attempts: int, rng: random.Random) -> Tensor:
    """Settings of all kinds."""
    return torch.tensor(
        [
            [
                rng.choice([0.0, 1e-30, 0.3, 1.0, 1.0, 5.0]),
                rng.choice([0, 0, 1, 7, 130, 1100, 10**9]),
                rng.choice([0.0, 0.1, 0.5, 0.9, 0.99, 1.0, 1.0]),
                rng.choice([0.0, 0.0, 0.01, 0.3, 1.0]),
                *(rng.choice([0.0, rng.random(), rng.random(), 1 - 2**-53]) for _ in range(attempts)),
            ]
            for _ in range(rows)
        ],
        dtype=torch.float64,
    )


@given(
    st.sampled_from(ROW_NAMES),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 5, 127, 128, 1025, 5000]),
    st.sampled_from([0.0, 0.01, 1.0, 4.0, 1000.0]),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.999, 1.0]),
    st.integers(0, 4),
    st.randoms(use_true_random=False),
)
def test_draws_are_those_of_plain_torch(
    name: str,
    dtype: torch.dtype,
    vocab: int,
    scale: float,
    coarse: bool,
    forbidden: float,
    odd: int,
    rng: random.Random,
) -> None:
    """Whether all logits are equal or one has all the mass, many are equal, forbidden, or no numbers."""
    generator = torch.Generator().manual_seed(rng.randrange(2**40))
    logits = torch.randn(11, vocab, generator=generator) * scale
    logits = logits.round() if coarse else logits
    logits[torch.rand(11, vocab, generator=generator) < forbidden] = -math.inf
    for _ in range(odd):
        logits[rng.randrange(11), rng.randrange(vocab)] = rng.choice([math.nan, -math.nan, math.inf, -math.inf])
    logits, table = logits.to(dtype), tables(11, 3, rng)
    found = draw_tokens(kernels_here()[name], guarded(logits), table).tolist()
    expected = torch_rows.draw_tokens(logits, table).tolist()
    for row, mine, token, other in zip(logits.float(), table.tolist(), found, expected, strict=True):
        if token != other:  # a number within rounding of where one token ends and the next begins
            assert token >= 0 and other >= 0 and not math.isinf(row[token]) and not math.isinf(row[other])
            weights = ((row.double() - row.max()) / mine[0]).exp()
            assert_neighbours(weights, mine, token, other)
        assert -2 <= token < vocab


def assert_neighbours(weights: Tensor, mine: list[float], token: int, other: int) -> None:
    """No weight to speak of lies between the two."""
    low, high = sorted((token, other))
    between = float(weights[low + 1 : high].sum() / weights.sum())
    assert mine[2] == 1 and between < 1e-6


@pytest.mark.usefixtures("two_threads")
@each
@each_dtype
def test_a_row_depends_on_nothing_but_itself(name: str, dtype: torch.dtype) -> None:
    """To the bit, whatever the rows beside it and the number of threads."""
    logits = (torch.randn(40, 7001, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    table, kernels = tables(40, 2, random.Random(1)), kernels_here()[name]
    many = [draw_tokens(kernels, logits, table) for _ in range(10)]
    torch.set_num_threads(1)
    alone = torch.cat([draw_tokens(kernels, logits[i : i + 1], table[i : i + 1]) for i in range(40)])
    assert all(torch.equal(found, alone) for found in many)
    assert torch.equal(draw_tokens(kernels, logits.flip(0), table.flip(0)).flip(0), alone)


@each
def test_more_numbers_do_not_change_what_few_decided(name: str) -> None:
    kernels = kernels_here()[name]
    logits = torch.randn(300, 900, generator=torch.Generator().manual_seed(0))
    table = torch.tensor([[1.0, 0, 0.3, 0, *(random.Random(i).random() for _ in range(20))] for i in range(300)])
    table = table.double()
    few, more = draw_tokens(kernels, logits, table[:, :6].contiguous()), draw_tokens(kernels, logits, table)
    decided = few != UNDECIDED
    assert 0 < int(decided.sum()) < 300
    assert torch.equal(few[decided], more[decided])
    assert (more >= 0).all()


@each
def test_nothing_is_left(name: str) -> None:
    logits = torch.full((3, 300), -math.inf)
    logits[1, 7] = -1e30
    table = torch.tensor([[0, 0, 1, 0, 0.5], [1, 0, 0.5, 0, 0.5], [1, 5, 1, 0, 0.5]], dtype=torch.float64)
    assert draw_tokens(kernels_here()[name], logits, table).tolist() == [NOTHING, 7, NOTHING]
    assert torch_rows.draw_tokens(logits, table).tolist() == [NOTHING, 7, NOTHING]


@given(
    st.sampled_from(ROW_NAMES),
    st.sampled_from(DTYPES),
    st.integers(1, 100),
    st.integers(0, 5),
    st.randoms(use_true_random=False),
)
def test_masked_rows(name: str, dtype: torch.dtype, vocab: int, rows: int, rng: random.Random) -> None:
    logits = torch.tensor([[rng.choice([0.0, 1.5, math.inf, math.nan]) for _ in range(vocab)] for _ in range(rows)])
    logits = logits.view(rows, vocab).to(dtype)
    allowed = [None if rng.random() < 0.3 else [rng.random() < 0.5 for _ in range(vocab)] for _ in range(rows)]
    masks = [None if row is None else np.packbits(row, bitorder="little") for row in allowed]
    found = mask_logits(kernels_here()[name], guarded(logits), masks)
    assert found.dtype is torch.float32
    for out, row, mask in zip(found.tolist(), logits.tolist(), allowed, strict=True):
        expected = [x if mask is None or mask[i] else -math.inf for i, x in enumerate(row)]
        assert out == pytest.approx(expected, abs=0, nan_ok=True)
