"""Scheduling with integers alone: order, budgets, admission, preemption. No model runs here."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.block_manager import BlockManager
from server.engine.request import FinishReason, Request, RequestStatus, SamplingParams
from server.engine.scheduler import ScheduledBatch, Scheduler


def make_scheduler(num_blocks: int = 32, **changes: Any) -> Scheduler:
    options: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "step_budget_ms": 50.0,
        "eos_token_id": 0,
        "max_model_len": 64,
    }
    return Scheduler(BlockManager(num_blocks, 4, True), **{**options, **changes})


def make_request(name: str, length: int, arrival: float = 0.0, **params: Any) -> Request:
    ids = [random.Random(name).randrange(1, 99) for _ in range(length)]
    return Request(name, ids, SamplingParams(**params), arrival=arrival)


def step(scheduler: Scheduler, token: int = 7) -> ScheduledBatch:
    batch = scheduler.schedule()
    tokens = {item.request.id: token for item in batch.items if item.samples}
    list(scheduler.update(batch, tokens))
    return batch


def shape(batch: ScheduledBatch) -> list[tuple[str, int, bool]]:
    return [(item.request.id, item.num_tokens, item.is_decode) for item in batch.items]


def test_prompts_are_chunked_and_decodes_go_first() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 10, 1))
    scheduler.add(make_request("b", 20, 2))
    assert shape(step(scheduler)) == [("a", 10, False), ("b", 6, False)]
    assert shape(step(scheduler)) == [("a", 1, True), ("b", 14, False)]
    assert shape(step(scheduler)) == [("a", 1, True), ("b", 1, True)]


def test_the_budget_in_milliseconds_holds_only_while_something_streams() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=40, step_budget_ms=5.0)
    scheduler.prompt_token_ms = 1.0
    scheduler.add(make_request("a", 30, 1))
    scheduler.add(make_request("b", 30, 2))
    assert shape(step(scheduler)) == [("a", 30, False), ("b", 10, False)]
    assert shape(step(scheduler)) == [("a", 1, True), ("b", 5, False)]


def test_the_cost_of_a_prompt_token_is_learned_from_steps() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 16, 1))
    batch = scheduler.schedule()
    scheduler.observe_step(batch, 32.0)
    assert scheduler.prompt_token_ms == 2.0
    scheduler.observe_step(batch, 16.0)
    assert scheduler.prompt_token_ms == pytest.approx(1.8)


def test_a_prompt_is_admitted_only_when_it_fits() -> None:
    scheduler = make_scheduler(num_blocks=5)
    scheduler.add(make_request("a", 12, 1))
    scheduler.add(make_request("b", 12, 2))
    scheduler.add(make_request("c", 4, 3))
    assert shape(step(scheduler)) == [("a", 12, False)]  # first come, first served: c does not overtake b
    assert [request.id for request in scheduler.waiting] == ["b", "c"]


def test_the_latest_arrival_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("a", 7, 1, max_tokens=20, ignore_eos=True))
    scheduler.add(make_request("b", 7, 2, max_tokens=5))
    step(scheduler)
    step(scheduler)  # both now hold 8 tokens: two blocks each
    batch = step(scheduler)
    assert shape(batch) == [("a", 1, True)]
    assert batch.preempted == 1
    b = scheduler.waiting[0]
    assert (b.id, b.status, b.block_table, b.num_output_tokens) == ("b", RequestStatus.WAITING, [], 2)
    assert scheduler.blocks.num_cached >= 1  # its full blocks stay until somebody needs them


def test_max_num_seqs() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for i in range(3):
        scheduler.add(make_request(f"r{i}", 2, i))
    assert len(step(scheduler).items) == 2
    assert len(scheduler.waiting) == 1


def test_a_scored_prompt_needs_no_last_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 9, max_tokens=0, prompt_logprobs=0))
    batch = step(scheduler)
    assert shape(batch) == [("a", 8, False)]
    assert batch.items[0].request.finish_reason is FinishReason.LENGTH
    assert not batch.items[0].samples


def test_generated_blocks_are_private() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4, max_tokens=9, ignore_eos=True))
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    again = Request("b", make_request("a", 4).token_ids + [7] * 8, SamplingParams())
    scheduler.add(again)
    step(scheduler)
    assert again.num_cached_tokens == 4


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=12),
    num_blocks=st.integers(11, 24),
    budget=st.integers(1, 40),
    aborts=st.sets(st.integers(0, 40)),
)
def test_everything_ends_and_every_block_comes_back(
    requests: list[tuple[int, int, int]], num_blocks: int, budget: int, aborts: set[int]
) -> None:
    scheduler = make_scheduler(num_blocks, max_num_batched_tokens=budget)
    everything = []
    for i, (length, max_tokens, family) in enumerate(requests):
        ids = [family + 1] * length  # families share prefixes
        scored = 0 if max_tokens == 0 else None
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=scored)
        everything.append(Request(f"r{i}", ids, params, arrival=float(i)))
        scheduler.add(everything[-1])
    for turn in range(3000):
        if not (scheduler.running or scheduler.waiting):
            break
        batch = step(scheduler)
        assert batch.items, "no progress"
        held = [b for request in scheduler.running for b in request.block_table]
        assert scheduler.blocks.num_held == len(set(held))
        assert [item.is_decode for item in batch.items] == sorted((i.is_decode for i in batch.items), reverse=True)
        if turn in aborts and (unfinished := [r for r in everything if r.status is not RequestStatus.FINISHED]):
            scheduler.finish(unfinished[turn % len(unfinished)], FinishReason.ABORT)
    assert all(request.status is RequestStatus.FINISHED for request in everything)
    for request in everything:
        if request.finish_reason is FinishReason.LENGTH:
            assert request.num_output_tokens == request.params.max_tokens
    blocks = scheduler.blocks
    assert (blocks.num_held, blocks.num_free + blocks.num_cached) == (0, num_blocks)
