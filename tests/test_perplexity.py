"""Conventions against plain loops that know nothing of windows' code, windows as properties, and what sums come to."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from lpa_model.config import Architecture
from lpa_model.model import LPAForCausalLM
from lpa_model.perplexity import (
    Convention,
    Method,
    Tally,
    Window,
    adds_bos,
    own_tokens,
    resolve_convention,
    windows,
)
from tests.tiny import CORPUS, VOCAB_SIZE, byte_tokenizer, random_model, tiny_config

BOS, EOS = 7, 0


def convention(method: Method, max_length: int, stride: int | None = None, prefix: int | None = None) -> Convention:
    return Convention(method, max_length, stride, prefix == BOS, prefix)


def all_of(length: int, stride: int) -> list[Convention]:
    """Every method at one length, with BOS and without."""
    return [
        *(convention(method, length, stride if method == "sliding" else None, prefix)
          for method in ("full", "sliding", "chunks") for prefix in (None, BOS)),
        convention("rolling", length, None, BOS),
        convention("rolling", length, None, EOS),
    ]  # fmt: skip


# --- oracles: each convention written as a loop over tokens or windows, from its source's description -----------------


def nll_after(model: LPAForCausalLM, context: list[int], token: int) -> float:
    return -logprobs_after(model, tuple(context))[token].item()


@lru_cache(5000)  # conventions share most contexts
def logprobs_after(model: LPAForCausalLM, context: tuple[int, ...]) -> torch.Tensor:
    logits = model.logits(model(torch.tensor([context])))[0, -1].double()
    return logits - torch.logsumexp(logits, 0)


def naive_full(model: LPAForCausalLM, ids: list[int], how: Convention) -> list[float]:
    sequence = ids if how.prefix_token_id is None else [how.prefix_token_id, *ids]
    return [nll_after(model, sequence[:t], sequence[t]) for t in range(1, len(sequence))]


def naive_sliding(model: LPAForCausalLM, ids: list[int], how: Convention) -> list[float]:
    """The context of token t is found by search: the first window that reaches it."""
    assert how.stride is not None
    sequence = ids if how.prefix_token_id is None else [how.prefix_token_id, *ids]
    found = []
    for t in range(1, len(sequence)):
        start = 0
        while start + how.max_length <= t:
            start += how.stride
        found.append(nll_after(model, sequence[start:t], sequence[t]))
    return found


def harness_windows(ids: list[int], prefix: int, max_seq_len: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) of the harness' rolling windows with one token of context, made disjoint."""
    yield [prefix], ids[:max_seq_len]
    done = max_seq_len
    while done < len(ids):
        continuation = ids[done : done + max_seq_len]
        end = done + len(continuation)
        yield ids[end - max_seq_len - 1 : done], continuation
        done = end


def naive_rolling(model: LPAForCausalLM, ids: list[int], how: Convention) -> list[float]:
    assert how.prefix_token_id is not None
    found = []
    for context, continuation in harness_windows(ids, how.prefix_token_id, how.max_length - 1):
        for i, token in enumerate(continuation):
            found.append(nll_after(model, context + continuation[:i], token))
    return found


def naive_chunks(model: LPAForCausalLM, ids: list[int], how: Convention) -> list[float]:
    n_ctx = how.max_length
    tokens = ids if how.prefix_token_id is None else [how.prefix_token_id, *ids]
    found = []
    for i in range(len(tokens) // n_ctx):
        chunk = tokens[i * n_ctx : (i + 1) * n_ctx]
        if how.prefix_token_id is not None:
            chunk[0] = how.prefix_token_id
        logits = model.logits(model(torch.tensor([chunk])))[0].double()
        first = n_ctx // 2
        for j in range(first, n_ctx - 1):  # the logits of position j predict token j + 1
            found.append((torch.logsumexp(logits[j], 0) - logits[j, chunk[j + 1]]).item())
    return found


def score_window(model: LPAForCausalLM, ids: list[int], window: Window) -> list[float]:
    """Log-probabilities of a window's scored tokens."""
    given = window.tokens(ids)
    logprobs = model.logits(model(torch.tensor([given])))[0].log_softmax(-1)
    return [logprobs[i - 1, given[i]].item() for i in range(window.first_index, window.length)]


def score(model: LPAForCausalLM, ids: list[int], how: Convention) -> Tally:
    """A text's sums, window by window."""
    tally, own = Tally(), own_tokens(ids, how)
    for window in windows(len(own), how):
        tally.add_logprobs(score_window(model, own, window))
    return tally


NAIVE = {"full": naive_full, "sliding": naive_sliding, "rolling": naive_rolling, "chunks": naive_chunks}


@pytest.mark.parametrize(
    ("architecture", "num_tokens"),
    [("setting1", 20), ("setting2", 24), ("setting1", 25), ("setting2", 47), ("setting1", 70)],
)
def test_every_convention_equals_its_loop(architecture: Architecture, num_tokens: int) -> None:
    model = random_model(tiny_config(architecture))
    ids = random.Random(num_tokens).choices(range(VOCAB_SIZE), k=num_tokens)
    asked = [*all_of(9, 4), *all_of(10, 1), *all_of(10, 9)]
    asked = [replace(how, max_length=100) if how.method == "full" else how for how in asked]
    for how in dict.fromkeys(asked):  # the stride is the sliding one's alone
        expected = NAIVE[how.method](model, ids, how)
        tally = score(model, ids, how)
        assert tally.num_tokens == len(expected) > 0
        assert tally.nll_sum == pytest.approx(math.fsum(expected), rel=1e-5)
        mean = math.fsum(expected) / len(expected)
        assert tally.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
        spread = math.fsum((x - mean) ** 2 for x in expected) / (len(expected) - 1)
        assert tally.perplexity_stderr == pytest.approx(math.exp(mean) * math.sqrt(spread / len(expected)), rel=1e-4)


def test_the_snippet_in_hugging_faces_document_weights_windows_as_the_docstring_says() -> None:
    model = random_model(tiny_config())
    ids = random.Random(5).choices(range(VOCAB_SIZE), k=60)
    max_length, stride = 16, 5
    weighted, weights, exact, counted, before = 0.0, 0, 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        target_length = end - before
        tokens = torch.tensor([ids[begin:end]])
        labels = tokens.clone()
        labels[:, :-target_length] = -100
        logits = model.logits(model(tokens))
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100).item()
        valid = int((labels != -100).sum()) - 1
        weighted, weights = weighted + loss * valid, weights + valid
        scored = int((labels[0, 1:] != -100).sum())
        exact, counted = exact + loss * scored, counted + scored
        before = end
        if end == len(ids):
            break
    how = convention("sliding", max_length, stride)
    tally = score(model, ids, how)
    assert (tally.num_tokens, tally.nll_sum) == (counted, pytest.approx(exact, rel=1e-5))
    cut = list(windows(len(ids), how))
    sums = [-math.fsum(score_window(model, ids, window)) for window in cut]
    factors = [window.num_scored - (i > 0) for i, window in enumerate(cut)]
    assert sum(factors) == weights
    means = [nll / window.num_scored for nll, window in zip(sums, cut, strict=True)]
    assert sum(map(float.__mul__, means, map(float, factors))) == pytest.approx(weighted, rel=1e-5)
    assert weighted / weights != pytest.approx(exact / counted, rel=1e-5)


# --- windows ----------------------------------------------------------------------------------------------------------


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    max_length = draw(st.integers(3, 60))
    return draw(st.integers(0, 300)), max_length, draw(st.integers(1, max_length - 1))


@given(sizes())
def test_windows_score_tokens_once_in_order_and_fit(drawn: tuple[int, int, int]) -> None:
    num_tokens, max_length, stride = drawn
    ids = list(range(1000, 1000 + num_tokens))
    for how in all_of(max_length, stride):
        front = how.prefix_token_id is not None
        if how.method == "full" and num_tokens + front > max_length:
            with pytest.raises(ValueError, match=rf"^has {num_tokens + front} tokens.* at most {max_length};"):
                windows(num_tokens, how)
            continue
        if how.method == "chunks" and num_tokens + front < 2 * max_length:
            with pytest.raises(ValueError, match=rf"^has {num_tokens + front} tokens.* at least {2 * max_length}, "):
                windows(num_tokens, how)
            continue
        cut = list(windows(num_tokens, how))
        scored = [token for window in cut for token in range(window.first_scored, window.end)]
        if how.method == "chunks":
            assert len(scored) == (num_tokens + front) // max_length * (max_length - max_length // 2 - 1)
            assert sorted(set(scored)) == scored
        else:
            assert scored == list(range(0 if front else 1, num_tokens))
        for index, window in enumerate(cut):
            given_tokens = window.tokens(ids)
            assert 2 <= len(given_tokens) == window.length <= max_length
            assert window.num_scored >= 1 <= window.first_index
            assert given_tokens[window.first_index :] == ids[window.first_scored : window.end]
            if window.prefix is not None:
                assert given_tokens[0] == how.prefix_token_id
            if how.method == "chunks" or index < len(cut) - 1 or (how.method == "rolling" and index):
                assert window.length == max_length
            if how.method == "sliding" and index:
                assert window.first_index >= max_length - stride


def test_windows_written_out() -> None:
    def cut(num_tokens: int, *how: Any) -> list[Window]:
        return list(windows(num_tokens, convention(*how)))

    assert cut(5, "full", 5) == [Window(0, 5, 1)]
    assert cut(5, "full", 6, None, BOS) == [Window(0, 5, 0, BOS)]
    assert cut(10, "sliding", 4, 3) == [Window(0, 4, 1), Window(3, 7, 4), Window(6, 10, 7)]
    assert cut(9, "sliding", 4, 2) == [Window(0, 4, 1), Window(2, 6, 4), Window(4, 8, 6), Window(6, 9, 8)]
    assert cut(7, "sliding", 4, 2, BOS) == [Window(0, 3, 0, BOS), Window(1, 5, 3), Window(3, 7, 5)]
    assert cut(7, "rolling", 4, None, EOS) == [Window(0, 3, 0, EOS), Window(2, 6, 3), Window(3, 7, 6)]
    assert cut(13, "chunks", 6) == [Window(0, 6, 4), Window(6, 12, 10)]
    assert cut(11, "chunks", 6, None, BOS) == [Window(0, 5, 3, BOS), Window(6, 11, 9, BOS)]
    for how in all_of(4, 2):
        if how.method != "chunks":
            assert list(windows(0, how)) == []
            first = [Window(0, 1, 0, how.prefix_token_id)]
            assert list(windows(1, how)) == ([] if how.prefix_token_id is None else first)


# --- conventions ------------------------------------------------------------------------------------------------------

MODEL: dict[str, Any] = {"context": 128, "bos_token_id": BOS, "eos_token_id": EOS, "adds_bos": True}


def test_what_is_not_asked_for_is_filled_in() -> None:
    assert resolve_convention("full", **MODEL) == Convention("full", 128, None, True, BOS)
    assert resolve_convention("sliding", 9, **MODEL) == Convention("sliding", 9, 4, True, BOS)
    assert resolve_convention("sliding", None, 100, False, **MODEL) == Convention("sliding", 128, 100, False, None)
    bare = {**MODEL, "adds_bos": False}
    assert resolve_convention("chunks", 64, **bare) == Convention("chunks", 64, None, False, None)
    assert resolve_convention("chunks", 64, add_bos=True, **bare) == Convention("chunks", 64, None, True, BOS)
    assert resolve_convention("rolling", 64, **bare) == Convention("rolling", 64, None, True, BOS)
    no_bos = {**bare, "bos_token_id": None}
    assert resolve_convention("rolling", 64, **no_bos) == Convention("rolling", 64, None, False, EOS)


@pytest.mark.parametrize(
    ("asked", "changes", "message"),
    [
        ({"method": "full", "max_length": 129}, {}, "max_length: 129 is more than .* 128"),
        ({"method": "full", "max_length": 1}, {}, "max_length: 1 is less than 2"),
        ({"method": "chunks", "max_length": 2}, {}, "max_length: 2 is less than 3"),
        ({"method": "sliding", "stride": 128}, {}, "stride: 128 .* = 127"),
        ({"method": "sliding", "stride": 0}, {}, "stride: 0 "),
        ({"method": "sliding", "stride": -1}, {}, "stride: -1 "),
        *(({"method": method, "stride": 4}, {}, "stride: has no meaning") for method in ("full", "rolling", "chunks")),
        ({"method": "full", "add_bos": True}, {"bos_token_id": None}, "add_bos: the model has no BOS"),
        ({"method": "rolling", "add_bos": True}, {"bos_token_id": None}, "add_bos: the model has no BOS"),
        ({"method": "rolling", "add_bos": False}, {}, "add_bos: cannot be false for method 'rolling'"),
        ({"method": "rolling"}, {"bos_token_id": None, "eos_token_id": None}, "method: 'rolling' needs a BOS or EOS"),
    ],
)
def test_what_cannot_be_is_named(asked: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        resolve_convention(**asked, **{**MODEL, **changes})


def test_the_tokenizers_own_setting_is_whether_its_post_processor_adds_bos() -> None:
    tokenizer = type(byte_tokenizer()).from_str(byte_tokenizer().to_str())
    assert not adds_bos(tokenizer, EOS)
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", EOS)])
    tokenizer.post_processor = template  # type: ignore[assignment]  # its stub has a narrower type
    assert adds_bos(tokenizer, EOS)
    assert not adds_bos(tokenizer, None)
    assert not adds_bos(tokenizer, BOS)


def test_a_text_with_its_own_bos_gets_no_second_one() -> None:
    assert own_tokens([BOS, 1, 2], convention("full", 8, None, BOS)) == [1, 2]
    assert own_tokens([1, BOS, 2], convention("full", 8, None, BOS)) == [1, BOS, 2]
    assert own_tokens([BOS, 1], convention("full", 8)) == [BOS, 1]
    assert own_tokens([BOS, 1], convention("rolling", 8, None, BOS)) == [BOS, 1]  # as the harness
    model = random_model(tiny_config())
    how = convention("sliding", 8, 4, BOS)
    assert score(model, [BOS, 1, 2, 3], how).nll_sum == score(model, [1, 2, 3], how).nll_sum


# --- sums -------------------------------------------------------------------------------------------------------------


def tally_of(logprobs: list[float], text: str = "") -> Tally:
    tally = Tally()
    tally.add_logprobs(logprobs)
    tally.count_text(text)
    return tally


@given(st.lists(st.floats(-1e6, 0), min_size=1, max_size=200), st.randoms())
def test_sums_are_exact_whatever_the_order_and_the_cut(logprobs: list[float], shuffle: random.Random) -> None:
    whole, pieces = tally_of(logprobs), Tally()
    shuffled = shuffle.sample(logprobs, len(logprobs))
    for start in range(0, len(shuffled), 7):
        pieces.add_text(tally_of(shuffled[start : start + 7]))
    assert whole.nll_sum == pieces.nll_sum == -math.fsum(logprobs)
    assert whole.perplexity == pieces.perplexity
    assert whole.perplexity_stderr == pieces.perplexity_stderr


def test_the_units_of_a_text_and_of_a_corpus() -> None:
    first, second = tally_of([-3.0, -1.0], "two words"), tally_of([-2.0], " é\n\nz ")
    assert (first.num_words, second.num_words) == (2, 4)  # empty strings at the ends count, as in the harness
    assert (first.num_bytes, second.num_bytes) == (9, 7)
    corpus = Tally()
    corpus.add_text(first)
    corpus.add_text(second)
    corpus.add_text(tally_of([]))  # an empty text is one word, of no bytes, without a perplexity
    assert corpus.metrics("full") == {
        "nll_sum": 6.0,
        "num_tokens": 3,
        "num_words": 7,
        "num_bytes": 16,
        "perplexity": pytest.approx(math.e**2),
        "perplexity_stderr": pytest.approx(math.e**2 / math.sqrt(3)),  # the NLLs' standard deviation is 1
        "word_perplexity": pytest.approx(math.exp(6 / 7)),
        "byte_perplexity": pytest.approx(math.exp(6 / 16)),
        "bits_per_byte": pytest.approx(6 / 16 / math.log(2)),
        "mean_perplexity": pytest.approx(math.e**2),
    }
    assert first.metrics("rolling")["mean_perplexity"] == first.perplexity
    unequal = Tally()
    unequal.add_text(tally_of([-1.0] * 9))
    unequal.add_text(tally_of([-2.0]))
    assert unequal.mean_perplexity == pytest.approx((math.e + math.e**2) / 2)
    assert unequal.perplexity == pytest.approx(math.exp(11 / 10))


def test_chunks_leave_half_a_text_unscored_so_its_words_and_bytes_are_no_measure() -> None:
    metrics = tally_of([-1.0, -2.0], "some words").metrics("chunks")
    assert (metrics["num_words"], metrics["num_bytes"]) == (2, 10)
    assert metrics["word_perplexity"] is metrics["byte_perplexity"] is metrics["bits_per_byte"] is None
    assert metrics["perplexity"] == pytest.approx(math.exp(1.5))


def test_there_is_no_number_where_there_is_none() -> None:
    nothing = tally_of([]).metrics("full")
    assert nothing["nll_sum"] == 0
    assert nothing["num_tokens"] == 0
    for name in ("perplexity", "perplexity_stderr", "word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert nothing[name] is None
    assert nothing["mean_perplexity"] is None
    assert tally_of([-1.0], "a").perplexity_stderr is None
    assert tally_of([-1e6, 0.0], "ab").metrics("full")["perplexity"] is None
    for broken in (math.nan, -math.inf, math.inf):
        with pytest.raises(ValueError, match="not a finite number"):
            tally_of([-1.0, broken])


def test_the_standard_error_covers_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(2)
    within, trials = 0, 600
    for _ in range(trials):
        tally = tally_of([-draw.uniform(1, 3) for _ in range(80)])
        assert tally.perplexity is not None
        assert tally.perplexity_stderr is not None
        within += abs(tally.perplexity - math.e**2) < tally.perplexity_stderr
    expected = NormalDist().cdf(1) - NormalDist().cdf(-1)
    assert within / trials == pytest.approx(expected, abs=0.06)


def test_a_real_text_from_end_to_end(architecture: Architecture) -> None:
    model = random_model(tiny_config(architecture))
    ids = byte_tokenizer().encode(CORPUS).ids
    tally = score(model, ids, convention("rolling", 32, None, EOS))
    tally.count_text(CORPUS)
    assert tally.num_tokens == len(ids)
    metrics = tally.metrics("rolling")
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(metrics["byte_perplexity"] or 0))
