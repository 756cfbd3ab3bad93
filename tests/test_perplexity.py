"""Windows as properties, and NLL sums against a loop that knows nothing of windows' code."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpa_model import perplexity as module
from lpa_model.config import Architecture
from lpa_model.model import LPAForCausalLM
from lpa_model.perplexity import Window, bits_per_byte, perplexity, score, windows
from tests.conftest import VOCAB_SIZE, random_model, tiny_config


@st.composite
def sliding(draw: st.DrawFn) -> tuple[int, int, int]:
    max_length = draw(st.integers(2, 60))
    return draw(st.integers(0, 300)), max_length, draw(st.integers(1, max_length - 1))


@given(sliding())
def test_sliding_windows_score_every_token_once_with_the_promised_context(sizes: tuple[int, int, int]) -> None:
    num_tokens, max_length, stride = sizes
    found = windows(num_tokens, "sliding", max_length, stride)
    scored = [token for window in found for token in range(window.first_scored, window.end)]
    assert scored == list(range(1, num_tokens))
    for index, window in enumerate(found):
        assert window.num_scored >= 1
        assert window.start == index * stride
        assert window.end - window.start <= max_length
        if index:
            assert window.first_scored - window.start >= max_length - stride
        if index < len(found) - 1:
            assert window.end - window.start == max_length
    if num_tokens > 1:
        assert (found[0].start, found[0].first_scored, found[-1].end) == (0, 1, num_tokens)


def test_sliding_windows_written_out() -> None:
    assert windows(10, "sliding", 4, 3) == [Window(0, 4, 1), Window(3, 7, 4), Window(6, 10, 7)]
    assert windows(9, "sliding", 4, 2) == [Window(0, 4, 1), Window(2, 6, 4), Window(4, 8, 6), Window(6, 9, 8)]


@given(st.integers(0, 100), st.integers(1, 100))
def test_full_is_one_window_or_an_error_that_says_how_long_the_text_is(num_tokens: int, max_length: int) -> None:
    if num_tokens > max_length:
        with pytest.raises(ValueError, match=rf"max_length: the text has {num_tokens} tokens.* at most {max_length};"):
            windows(num_tokens, "full", max_length, 1)
    else:
        assert windows(num_tokens, "full", max_length, 1) == ([Window(0, num_tokens, 1)] if num_tokens > 1 else [])


@pytest.mark.parametrize("stride", [-1, 0, 8, 9])
def test_a_stride_outside_the_window_is_named(stride: int) -> None:
    with pytest.raises(ValueError, match=rf"stride: {stride} .* = 7"):
        windows(20, "sliding", 8, stride)


def test_perplexity_and_bits_per_byte() -> None:
    assert perplexity(3 * math.log(7), 3) == pytest.approx(7)
    assert perplexity(1e6, 1) == math.inf
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)
    with pytest.raises(ValueError, match="num_tokens"):
        perplexity(0.0, 0)
    with pytest.raises(ValueError, match="num_bytes"):
        bits_per_byte(0.0, 0)


def naive_nll(model: LPAForCausalLM, ids: list[int], max_length: int, stride: int) -> float:
    """One forward per scored token, in float64 after the logits; the context of token t found by search."""
    total = 0.0
    for t in range(1, len(ids)):
        start = 0
        while start + max_length <= t:
            start += stride
        logits = model.logits(model(torch.tensor([ids[start:t]])))[0, -1].double()
        total += (torch.logsumexp(logits, 0) - logits[ids[t]]).item()
    return total


@pytest.mark.parametrize("stride", [1, 7, 23])
def test_score_equals_a_naive_loop(architecture: Architecture, stride: int) -> None:
    model = random_model(tiny_config(architecture))
    ids = random.Random(3).choices(range(VOCAB_SIZE), k=70)
    seen: list[Window] = []
    nll_sum, num_tokens = score(model, ids, "sliding", 24, stride, seen.append)
    assert num_tokens == 69
    assert nll_sum == pytest.approx(naive_nll(model, ids, 24, stride), rel=1e-6)
    assert seen == windows(70, "sliding", 24, stride)


def test_full_equals_a_naive_loop_whatever_the_chunks(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(tiny_config(architecture))
    ids = random.Random(4).choices(range(VOCAB_SIZE), k=100)
    expected = naive_nll(model, ids, 128, 1)
    for rows in (256, 99, 7, 1):
        monkeypatch.setattr(module, "LOGIT_ROWS", rows)
        assert score(model, ids, "full", 128, 1) == (pytest.approx(expected, rel=1e-6), 99)


def test_score_never_holds_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config(max_position_embeddings=700))
    heights: list[int] = []

    logits = LPAForCausalLM.logits

    def watched(self: LPAForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
        heights.append(hidden.shape[0])
        return logits(self, hidden)

    monkeypatch.setattr(LPAForCausalLM, "logits", watched)
    score(model, [5] * 700, "full", 700, 1)
    assert max(heights) == 256
    assert sum(heights) == 699


def test_score_edges() -> None:
    model = random_model(tiny_config())
    assert score(model, [], "full", 128, 1) == (0.0, 0)
    assert score(model, [7], "sliding", 128, 64) == (0.0, 0)
    with pytest.raises(ValueError, match="max_length: 129 is more than the model's context of 128"):
        score(model, [1, 2], "full", 129, 1)
