"""Continuations of one beginning in one sequence: positions, what each sees, and log-probabilities like one by one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpa_model.batch import Span
from lpa_model.config import Architecture
from server.engine.request import Request, SamplingParams
from tests.test_engine import assert_greedy, drain, greedy, ids_of, make_engine, naive_logprobs, prompt
from tests.tiny import VOCAB_SIZE, random_model, tiny_config

PARTS = st.tuples(st.integers(1, 12), st.lists(st.integers(1, 6), min_size=1, max_size=5))


def branch_request(name: str, trunk: list[int], branches: list[list[int]]) -> Request:
    token_ids, starts = list(trunk), []
    for branch in branches:
        starts.append(len(token_ids))
        token_ids += branch
    params = SamplingParams(max_tokens=0, prompt_logprobs=2, first_logit_position=len(trunk) - 1)
    return Request(name, token_ids, params, branches=tuple(starts))


def expected(model: Any, trunk: list[int], branches: list[list[int]]) -> list[float]:
    """The first tokens of all branches, then the others, each branch scored by itself."""
    alone = [naive_logprobs(model, trunk + branch)[len(trunk) - 1 :] for branch in branches]
    return [scores[0] for scores in alone] + [score for scores in alone for score in scores[1:]]


def draw_branches(seed: int, trunk: int, lengths: list[int]) -> tuple[list[int], list[list[int]]]:
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return draw.choices(range(1, VOCAB_SIZE), k=count)

    return ids(trunk), [ids(length) for length in lengths]


@given(PARTS, st.data())
def test_a_branch_stands_behind_the_trunk_and_sees_nothing_else(
    parts: tuple[int, list[int]], data: st.DataObject
) -> None:
    trunk, lengths = parts
    owner = [0] * trunk + [i + 1 for i, n in enumerate(lengths) for _ in range(n)]
    place = [*range(trunk), *(trunk + j for n in lengths for j in range(n))]
    starts = tuple(owner.index(i + 1) for i in range(len(lengths)))
    context = data.draw(st.integers(0, len(owner) - 1))
    length = data.draw(st.integers(1, len(owner) - context))
    span = Span(context, length, [], False, starts)
    assert span.positions().tolist() == place[: context + length]
    for i, row in enumerate(span.mask().tolist(), context):
        assert row == [j <= i and owner[j] in (0, owner[i]) for j in range(context + length)]
    assert span.is_branched == (owner[context + length - 1] > 0)


@given(PARTS, st.integers(1, 9))
def test_what_is_scored_does_not_depend_on_the_cut(parts: tuple[int, list[int]], step: int) -> None:
    request = branch_request("r", [5] * parts[0], [[6] * n for n in parts[1]])
    total = len(request.token_ids)
    whole = request.scored(0, total)
    pieces = [pair for at in range(0, total, step) for pair in request.scored(at, min(step, total - at))]
    assert pieces == whole
    assert len(whole) == request.num_scored(0, total) == sum(parts[1])
    assert sorted(target for _, target in whole) == list(range(parts[0], total))
    assert all(token < total - 1 for token, _ in whole)  # the last token is not computed


@pytest.mark.parametrize(
    ("architecture", "layout", "budget"),
    [
        *(("setting1", layout, 7) for layout in ("auto", "mixed", "full")),
        *(("setting2", layout, 7) for layout in ("auto", "full")),  # mixed is what auto takes
        *((architecture, "auto", budget) for architecture in ("setting1", "setting2") for budget in (64, 2048)),
    ],
)
def test_branches_score_like_one_by_one(
    tiny_checkpoint: Path, architecture: Architecture, layout: str, budget: int
) -> None:
    """In chunks and whole, with the prefix in the cache and without, beside streams and other texts."""
    engine = make_engine(tiny_checkpoint, kv_cache_layout=layout, max_num_batched_tokens=budget)
    model = random_model(tiny_config(architecture))
    sizes = [(20, [3, 1, 7]), (1, [4, 4]), (33, [1]), (8, [2, 9, 1, 1]), (20, [3, 1, 7]), (60, [5, 5, 5, 5])]
    asked = [draw_branches(seed, *size) for seed, size in enumerate(sizes)]
    alone, whole = [expected(model, *each) for each in asked], naive_logprobs(model, prompt(1, 50))
    for _ in range(2):
        for i, (trunk, branches) in enumerate(asked):
            engine.add_request(branch_request(f"b{i}", trunk, branches))
        engine.add_request(Request("stream", prompt(3, 9), greedy(12)))
        engine.add_request(Request("text", prompt(1, 50), greedy(0, prompt_logprobs=0)))
        outputs = drain(engine)
        for i in range(len(asked)):
            scores = outputs[f"b{i}"][-1].prompt_logprobs
            assert scores.logprobs == pytest.approx(alone[i], abs=1e-4)
            assert {len(top) for top in scores.top_ids} == {2}
        assert_greedy(model, prompt(3, 9), 12, ids_of(outputs["stream"]))
        found = outputs["text"][-1].prompt_logprobs.logprobs
        assert found == pytest.approx(whole, abs=1e-4)
    assert outputs["b5"][-1].num_cached_tokens == 56  # whole blocks of 8 before the trunk's last token
    after_trunk = Request("after", asked[5][0] + asked[5][1][0] + [9], greedy(0, prompt_logprobs=0))
    engine.add_request(after_trunk)
    found = drain(engine)["after"][-1].prompt_logprobs.logprobs
    assert found == pytest.approx(naive_logprobs(model, after_trunk.token_ids), abs=1e-4)


def test_blocks_of_branches_are_nobody_elses(tiny_checkpoint: Path, architecture: Architecture) -> None:
    """A prompt that spells trunk and branches as one text must not find their blocks: it sees more."""
    engine = make_engine(tiny_checkpoint)
    trunk, branches = draw_branches(1, 12, [10, 10, 10])
    engine.add_request(branch_request("b", trunk, branches))
    drain(engine)
    spelled = trunk + [token for branch in branches for token in branch]
    engine.add_request(Request("spelled", spelled, greedy(4)))
    outputs = drain(engine)["spelled"]
    assert outputs[-1].num_cached_tokens == 8
    assert_greedy(random_model(tiny_config(architecture)), spelled, 4, ids_of(outputs))


def test_branches_survive_preemption(tiny_checkpoint: Path, architecture: Architecture) -> None:
    bytes_per_token = 2 * 2 * 4 * 32 * 4  # full keys and values of two layers in float32, heads padded to 32
    options = {"kv_cache_layout": "full", "kv_cache_memory": 15 * 8 * bytes_per_token, "max_num_batched_tokens": 6}
    engine = make_engine(tiny_checkpoint, **options)
    model = random_model(tiny_config(architecture))
    trunk, branches = draw_branches(2, 40, [9, 9, 9, 9])
    engine.add_request(Request("stream", prompt(3, 30), greedy(60)))
    engine.step()
    engine.add_request(branch_request("b", trunk, branches))
    outputs = drain(engine)
    assert engine.take_stats().preemptions > 0
    assert outputs["b"][-1].prompt_logprobs.logprobs == pytest.approx(expected(model, trunk, branches), abs=1e-4)


def test_only_the_beginning_is_computed_once(tiny_checkpoints: dict[Architecture, Path]) -> None:
    engine = make_engine(tiny_checkpoints["setting2"])
    trunk, branches = draw_branches(4, 50, [5, 5, 5, 5])
    engine.add_request(branch_request("b", trunk, branches))
    drain(engine)
    stats = engine.take_stats()
    assert (stats.prompt_tokens, stats.scored_tokens) == (50 + 20 - 1, 20)
