"""Sampling as a pure function of logits and per-row parameters, against definitions written out in Python floats."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpa_model.backends import features
from lpa_model.backends.base import Mask, SamplingRow, Scores, uniform
from lpa_model.backends.cpu.logits import row_ops
from lpa_model.backends.torch import rows as torch_rows
from lpa_model.backends.torch import sampling
from lpa_model.backends.torch.results import _broken_rows
from lpa_model.backends.torch.rows import NOTHING
from lpa_model.backends.torch.sampling import TORCH_ROWS, RowOps
from server.engine.request import Request, SamplingParams
from server.engine.sampling_state import SamplingState

VOCAB = 40
PROMPT = [3, 5, 5, 9]


def kernels(dtype: torch.dtype = torch.float32) -> RowOps:
    """What a CPU samples with; there are no kernels for other types."""
    best = features.instruction_sets()[0]
    return row_ops(best) if dtype in (torch.float32, torch.bfloat16) else TORCH_ROWS


def sample(
    logits: torch.Tensor, rows: list[SamplingRow], masks: list[Mask | None] | None = None, ops: RowOps | None = None
) -> list[int]:
    return sampling.sample(logits, rows, masks or [None] * len(rows), ops or kernels(logits.dtype))


def score(logits: torch.Tensor, targets: torch.Tensor, top: int, ops: RowOps | None = None) -> Scores:
    return sampling.score(logits, targets, top, ops or kernels(logits.dtype))


def row(draw: float = 0.5, **keys: Any) -> SamplingRow:
    """A row without a past."""
    return row_after([], draw, eos=None, **keys)


def row_after(generated: list[int], draw: float, eos: int | None = 0, **keys: Any) -> SamplingRow:
    """The row of a request that has generated these tokens one by one."""
    request = Request("r", PROMPT, SamplingParams(max_tokens=50, **keys))
    state = SamplingState(request, [] if eos is None else [eos])
    for token in generated:
        state.row(request, 0)
        request.token_ids.append(token)
    return replace(state.row(request, 0), draws=lambda attempt: draw)


def mask_of(tokens: set[int]) -> np.ndarray:
    """A bit per token, lowest first, in whole bytes."""
    mask = bytearray(-(-VOCAB // 8))
    for token in tokens:
        mask[token // 8] |= 1 << token % 8
    return np.frombuffer(bytes(mask), np.uint8)


def steer(
    logits: list[float], params: SamplingParams, generated: list[int], grammar: set[int] | None, eos: int | None = 0
) -> list[float]:
    """The oracle's first half: bans, bias and penalties of one row, as the documents of vLLM and OpenAI define them."""
    forbidden = set()
    if grammar is not None:
        forbidden |= {t for t in range(len(logits)) if t not in grammar}
    if params.allowed_token_ids is not None:
        forbidden |= {t for t in range(len(logits)) if t not in params.allowed_token_ids}
    for words in params.bad_words:
        if list(words[:-1]) == generated[len(generated) - len(words) + 1 :] and len(words) - 1 <= len(generated):
            forbidden.add(words[-1])
    if len(generated) < params.min_tokens:
        forbidden |= {*params.stop_token_ids} | ({eos} if eos is not None else set())
    out, bias = [], dict(params.logit_bias)
    f32 = np.float32  # so that ties and boundaries fall as they do there
    for token, logit in enumerate(logits):
        x = f32(logit) + f32(bias.get(token, 0.0))
        if token in PROMPT or token in generated:
            repetition = f32(params.repetition_penalty)
            x = x / repetition if x > 0 else x * repetition
        x -= f32(params.frequency_penalty) * f32(generated.count(token))
        x -= f32(params.presence_penalty) if token in generated else f32(0)
        out.append(-math.inf if token in forbidden else float(x))
    return out


def distribution(steered: list[float], params: SamplingParams) -> dict[int, float]:
    """The oracle's second half: what may be drawn, with its probability; best first."""
    best = max(steered)
    weights = {t: math.exp((x - best) / params.temperature) for t, x in enumerate(steered)}
    weights = {t: w for t, w in weights.items() if w >= params.min_p and w > 0}
    order = sorted(weights, key=lambda t: (-steered[t], t))[: params.top_k or None]
    total = sum(weights[t] for t in order)
    better = {t: sum(weights[o] for o in order if steered[o] > steered[t]) for t in order}
    kept = [t for t in order if params.top_p == 1 or better[t] < params.top_p * total or better[t] == 0]
    mass = sum(weights[t] for t in kept)
    return {t: weights[t] / mass for t in kept}


def hits(probabilities: dict[int, float], order: list[int], token: int, draw: float, slack: float) -> bool:
    """Whether the inverse distribution in the given order has the token at the draw, but for rounding."""
    if token not in probabilities:
        return False
    start = sum(probabilities.get(t, 0.0) for t in order[: order.index(token)])
    return start - slack <= draw <= start + probabilities[token] + slack


tokens = st.integers(0, VOCAB - 1)
penalties = st.one_of(st.just(0.0), st.floats(-2, 2))
every_param = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0]),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(0, 2 * VOCAB),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.1, 2),
        "presence_penalty": penalties,
        "frequency_penalty": penalties,
        "logit_bias": st.dictionaries(tokens, st.floats(-100, 100), max_size=5).map(lambda d: tuple(d.items())),
        "allowed_token_ids": st.lists(tokens, min_size=1, unique=True).map(tuple),
        "bad_words": st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
        "min_tokens": st.integers(0, 8),
        "stop_token_ids": st.lists(tokens, max_size=2).map(tuple),
    },
)
grammars = st.one_of(st.none(), st.sets(tokens, min_size=1))
pasts = st.lists(st.integers(0, 6), max_size=8)  # few tokens, so that they repeat and complete bad words
draws = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize("compiled", [True, False])
@given(every_param, pasts, grammars, draws, st.integers(0, 10**6), st.booleans())
def test_every_parameter_equals_its_definition(
    compiled: bool,
    keys: dict[str, Any],
    generated: list[int],
    grammar: set[int] | None,
    draw: float,
    seed: int,
    coarse: bool,
) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    if coarse:  # many equal ones
        logits = logits.round()
    params = SamplingParams(**keys)
    it = row_after(generated, draw, **keys)
    mask = None if grammar is None else mask_of(grammar)
    before = logits.clone()
    (token,) = sample(logits[None], [it], [mask], kernels() if compiled else TORCH_ROWS)
    assert torch.equal(logits, before)

    steered = steer(logits.tolist(), params, generated, grammar)
    if max(steered) == -math.inf:
        assert token == NOTHING
        return
    if params.temperature == 0:
        assert token == steered.index(max(steered))
        return
    # float32 may see the boundary of a filter on the other side
    near = [
        replace(params, top_p=params.top_p * (1 + slack) if params.top_p < 1 else 1.0, min_p=params.min_p * (1 - slack))
        for slack in (-1e-5, 0.0, 1e-5)
    ]
    allowed = [distribution(steered, p) for p in near if p.min_p <= 1]
    assert any(token in probabilities for probabilities in allowed)
    if params.top_p == 1:
        assert any(hits(probabilities, sorted(probabilities), token, draw, 1e-4) for probabilities in allowed)


@given(st.lists(st.tuples(every_param, pasts, grammars, draws), min_size=2, max_size=9), st.integers(0, 10**6))
def test_a_row_does_not_depend_on_its_company(
    many: list[tuple[dict[str, Any], list[int], set[int] | None, float]], seed: int
) -> None:
    logits = torch.randn(len(many), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    rows = [row_after(generated, draw, **keys) for keys, generated, _, draw in many]
    masks = [None if grammar is None else mask_of(grammar) for _, _, grammar, _ in many]
    together = sample(logits, rows, masks)
    assert together == [sample(logits[i : i + 1], [it], [masks[i]])[0] for i, it in enumerate(rows)]
    assert together[::-1] == sample(logits.flip(0), rows[::-1], masks[::-1])


def test_sums_and_scores_of_a_row_are_the_same_bits_in_any_batch(two_threads: None) -> None:
    """A vocabulary that is no multiple of anything, and enough of it for one row's sum to be split among threads."""
    logits = torch.randn(17, 70001, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    sums = torch_rows.block_sums(weights).sum(-1)
    targets = torch.arange(17) * 7
    whole = score(logits, targets, 5)
    for i in (0, 1, 16):
        assert torch.equal(sums[i : i + 1], torch_rows.block_sums(weights[i : i + 1]).sum(-1))
        one = score(logits[i : i + 1], targets[i : i + 1], 5)
        assert (one.logprobs[0], one.ranks[0]) == (whole.logprobs[i], whole.ranks[i])
        assert (one.top_ids[0], one.top_logprobs[0]) == (whole.top_ids[i], whole.top_logprobs[i])
    for top in (0, 1):
        assert score(logits, targets, top).logprobs == whole.logprobs


@pytest.mark.parametrize("scale", [0.0, 0.001, 1.0, 30.0])
@pytest.mark.parametrize("coarse", [False, True])
def test_draws_of_a_large_vocabulary_are_what_sorting_would_keep(scale: float, coarse: bool) -> None:
    """From all tokens equal to one that has it all; and draws reach into every part of what is kept."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(3)) * scale
    logits = logits.bfloat16().float() if coarse else logits
    weights, order = (logits - logits.max()).exp().double().sort(descending=True, stable=True)
    for top_k, top_p in [(1, 1.0), (17, 1.0), (2500, 1.0), (9999, 1.0), (0, 0.5), (0, 0.999), (1000, 0.8), (3, 0.01)]:
        one = row(top_k=top_k, top_p=top_p)
        rows = [replace(one, draws=partial(uniform, 1, 0, i)) for i in range(300)]
        drawn = torch.tensor(sample(logits.expand(300, -1), rows))
        mine = weights[:top_k] if top_k else weights
        first = torch.searchsorted(-mine, -mine)  # of those that are equal
        before = (mine.cumsum(0) - mine)[first]
        kept = int((before < (top_p + 1e-6) * mine.sum()).sum()) if top_p < 1 else len(mine)
        ranks = torch.empty_like(order).scatter_(0, order, torch.arange(5000))[drawn]
        assert int(ranks.max()) < kept
        mine = mine[:kept] / mine[:kept].sum()
        share = mine.cumsum(0)
        assert float(share[ranks].max()) > 0.97 and float((share - mine)[ranks].min()) < 0.03


@pytest.mark.parametrize(
    "keys",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "logit_bias": ((1, 3.0), (2, -100.0))},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.0, "min_p": 0.2},
    ],
)
def test_frequencies_follow_the_distribution(keys: dict[str, Any]) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    count = 4000
    params = SamplingParams(**keys)
    rows = [row_after([], (i + 0.5) / count, **keys) for i in range(count)]
    counts = Counter(sample(logits.expand(count, -1), rows))
    expected = distribution(steer(logits.tolist(), params, [], None), params)
    assert set(counts) <= set(expected)
    for token, probability in expected.items():
        assert counts[token] / count == pytest.approx(probability, abs=1.5 / count)


# the values that chi-square passes once in a thousand, by degrees of freedom
CHI_SQUARE = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3, 8: 26.1, 9: 27.9, 10: 29.6, 11: 31.3}


@pytest.mark.parametrize("step", [0.0, 1.0])  # 1: many equal logits
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"top_p": 0.95},
        {"top_p": 0.6},
        {"top_p": 0.2},
        {"top_p": 0.7, "min_p": 0.1},
        {"top_k": 5},
        {"top_k": 6, "top_p": 0.8},
    ],
)
def test_hashed_draws_pass_a_chi_square_test(keys: dict[str, Any], step: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(2))
    logits = logits.round() if step else logits
    count = 6000
    params = SamplingParams(**keys)
    asked = row(**keys)
    rows = [replace(asked, draws=partial(uniform, 7, 0, i)) for i in range(count)]
    counts = Counter(sample(logits.expand(count, -1), rows))
    expected = distribution(logits.tolist(), params)
    assert set(counts) <= set(expected)
    if len(expected) > 1:
        statistic = sum((counts[t] - p * count) ** 2 / (p * count) for t, p in expected.items())
        assert statistic < CHI_SQUARE[len(expected) - 1]


def test_tiny_temperatures_and_non_finite_logits_stay_within_the_vocabulary() -> None:
    logits = torch.tensor([[1.0, 300.0, -40.0]])
    assert sample(logits, [row(0.5, temperature=1e-30)]) == [1]
    for bad, keys in itertools.product((math.nan, math.inf), ({}, {"top_p": 0.5}, {"top_k": 2}, {"temperature": 0})):
        (token,) = sample(torch.tensor([[1.0, bad, -1.0]]), [row(0.99, **keys)])
        assert 0 <= token < 3


def test_nothing_is_waived_where_nothing_is_left() -> None:
    logits = torch.zeros(1, VOCAB)
    keys = {"logit_bias": ((1, 100.0),), "allowed_token_ids": (1, 2), "bad_words": ((2,),), "temperature": 0.0}
    assert sample(logits, [row_after([], 0.0, **keys)]) == [1]
    assert sample(logits, [row_after([], 0.0, **keys)], [mask_of({7, 9})]) == [NOTHING]
    # the end of the text is all there is
    assert sample(logits, [row_after([], 0.0, min_tokens=5)], [mask_of({0})]) == [NOTHING]


def test_bad_words_look_at_generated_tokens_only() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 1.0
    keys: dict[str, Any] = {"temperature": 0.0, "bad_words": ((9, 7), (4, 4, 7))}
    assert sample(logits, [row_after([], 0.0, **keys)]) == [7]  # the prompt ends with 9
    assert sample(logits, [row_after([9], 0.0, **keys)]) == [0]
    assert sample(logits, [row_after([4], 0.0, **keys)]) == [7]
    assert sample(logits, [row_after([4, 4], 0.0, **keys)]) == [0]


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 5))
def test_counts_are_kept_up(generated: list[int], unasked: int) -> None:
    """Whether rows are asked for after every token or not."""
    request = Request("r", PROMPT, SamplingParams(max_tokens=50, repetition_penalty=1.5, presence_penalty=1.0))
    state = SamplingState(request, [0])
    for i, token in enumerate(generated):
        request.token_ids.append(token)
        if i % (unasked + 1) == 0:
            state.row(request, 0)
    it = state.row(request, 0)
    assert it.seen is not None and it.counts is not None
    found = dict(zip(it.seen.tolist(), it.counts.tolist(), strict=True))
    assert found == {token: generated.count(token) for token in {*PROMPT, *generated}}


def test_uniform_is_stateless_and_even() -> None:
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    assert len({uniform(s, c, p, a) for s in range(4) for c in range(4) for p in range(4) for a in range(4)}) == 256
    numbers = [uniform(9, 0, p) for p in range(4000)]
    assert all(0 <= u < 1 for u in numbers)
    assert sum(numbers) / 4000 == pytest.approx(0.5, abs=0.02)


def test_scores() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 5.0]])
    columns = score(logits, torch.tensor([2, 3]), 2)
    norm = math.log(sum(math.exp(x) for x in (1.0, 3.0, 2.0, 3.0)))
    assert columns.logprobs[0] == pytest.approx(2.0 - norm, abs=1e-6)
    assert columns.ranks == [3, 1]
    assert columns.top_ids == [[1, 3], [3, 0]]
    assert columns.top_logprobs[1][0] == columns.logprobs[1]  # the very same number
    assert score(logits, torch.tensor([1, 0]), 0).top_ids == [[], []]


@given(
    st.integers(0, 10**6),
    st.integers(1, 7),
    st.integers(0, 60),
    st.sampled_from([0.5, 2.0, 100.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_ranks_and_best_equal_a_stable_sort(seed: int, rows: int, top: int, step: float, dtype: torch.dtype) -> None:
    logits = (torch.randn(rows, 50, generator=torch.Generator().manual_seed(seed)) * 5 / step).round() * step
    logits = logits.to(dtype)
    targets = torch.tensor([random.Random(seed + i).randrange(50) for i in range(rows)])
    columns = score(logits, targets, top)
    for i in range(rows):
        order = sorted(range(50), key=lambda t: (-float(logits[i, t]), t))
        assert columns.top_ids[i] == order[:top]
        rank = order.index(int(targets[i])) + 1
        assert columns.ranks[i] == rank
        if rank <= top:
            assert columns.top_logprobs[i][rank - 1] == columns.logprobs[i]


@pytest.mark.parametrize("top", [0, 1, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_without_a_kernel_are_the_same(dtype: torch.dtype, top: int) -> None:
    """Where logits are not finite too."""
    logits = (torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(5)) * 2).round()  # many equal ones
    for i, bad in enumerate((math.nan, -math.nan, math.inf, -math.inf)):
        logits[i, i] = logits[i + 4, 3::7] = logits[i + 8] = bad
    logits[12, 5], logits[12, 7] = math.inf, math.nan
    logits[13, 5:9] = torch.tensor([-math.inf, -math.nan, math.inf, math.nan])
    targets = torch.arange(20) % 10
    logits = logits.to(dtype)
    compiled = score(logits, targets, top)
    plain = score(logits, targets, top, TORCH_ROWS)
    assert (compiled.ranks, compiled.top_ids) == (plain.ranks, plain.top_ids)
    assert compiled.logprobs == pytest.approx(plain.logprobs, rel=1e-6, nan_ok=True)
    for found, expected in zip(compiled.top_logprobs, plain.top_logprobs, strict=True):
        assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)
    finite = [math.isfinite(x) for x in compiled.logprobs]
    assert finite == [bool(row.double().softmax(-1)[t] > 0) for row, t in zip(logits, targets.tolist(), strict=True)]


def test_what_numpy_does_on_a_cpu_torch_does_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(5)).round()  # many equal ones
    targets = torch.arange(20)
    asked: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_k": 3}, {"top_k": 7, "top_p": 0.5}, {"top_p": 0.5}]
    rows = [row(i / 20, **asked[i % 4]) for i in range(20)]

    def found() -> tuple[list[int], Scores, Scores]:
        return (
            sample(logits, rows, ops=TORCH_ROWS),
            score(logits, targets, 0, TORCH_ROWS),
            score(logits, targets, 6, TORCH_ROWS),
        )

    expected = found()
    monkeypatch.setattr(torch_rows, "_in_numpy", lambda tensor: False)
    assert found() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_with_numbers_that_are_not_finite_are_found(dtype: torch.dtype) -> None:
    logits = torch.randn(7, VOCAB, dtype=torch.float32).to(dtype)
    assert _broken_rows(logits) == set()
    logits[1, 3], logits[2, 0], logits[4, 39] = math.nan, math.inf, -math.inf
    logits[5, 1], logits[5, 2] = math.inf, -math.inf
    logits[6] = torch.finfo(dtype).min / VOCAB
    assert _broken_rows(logits) == {1, 2, 4, 5}


def test_every_bfloat16_that_is_not_finite_is_found() -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
    logits = torch.zeros(len(every), 3, dtype=torch.bfloat16)
    logits[:, 1] = every
    assert _broken_rows(logits) == set((~every.isfinite()).nonzero()[:, 0].tolist())
