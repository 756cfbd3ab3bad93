"""Scheduling with integers alone: order, budgets, admission, preemption. No model runs here."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.engine.block_manager import BlockManager
from server.engine.request import BACKGROUND, FinishReason, Request, RequestStatus, SamplingParams
from server.engine.scheduler import ScheduledBatch, Scheduler
from server.engine.step_cost import Work


def make_scheduler(num_blocks: int = 32, **changes: Any) -> Scheduler:
    options: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "step_budget_ms": 50.0,
        "eos_token_ids": {0},
        "max_model_len": 64,
    }
    return Scheduler(BlockManager(num_blocks, 4, True), **{**options, **changes})


def make_request(name: str, length: int, arrival: float = 0.0, **params: Any) -> Request:
    ids = [random.Random(name).randrange(1, 99) for _ in range(length)]
    return Request(name, ids, SamplingParams(**params), arrival=arrival)


def step(scheduler: Scheduler, token: int = 7) -> ScheduledBatch:
    batch = scheduler.schedule()
    scheduler.observe_step(batch, 1.0)
    tokens = {item.request.id: token for item in batch.items if item.samples}
    list(scheduler.update(batch, tokens))
    return batch


def drain(scheduler: Scheduler, max_steps: int = 500) -> None:
    for _ in range(max_steps):
        if not (scheduler.running or scheduler.waiting):
            return
        step(scheduler)
    raise AssertionError("some requests never end")


def waiting(scheduler: Scheduler) -> list[str]:
    return [request.id for request in heapq.merge(*scheduler.waiting.ready.values(), key=lambda r: r.order)]


def shape(batch: ScheduledBatch) -> list[tuple[str, int, bool]]:
    return [(item.request.id, item.num_tokens, item.is_decode) for item in batch.items]


def test_prompts_are_chunked_and_decodes_go_first() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 10, 1))
    scheduler.add(make_request("b", 20, 2))
    assert shape(step(scheduler)) == [("a", 10, False), ("b", 6, False)]
    assert shape(step(scheduler)) == [("a", 1, True)]  # how long decodes take alone is not known yet
    assert shape(step(scheduler)) == [("a", 1, True), ("b", 14, False)]
    assert shape(step(scheduler)) == [("a", 1, True), ("b", 1, True)]


def test_the_budget_in_milliseconds_holds_only_while_something_streams() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    scheduler.cost.observe(0, Work(100, 0, 0), 100.0)
    scheduler.cost.observe(1, Work(), 10.0)
    scheduler.add(make_request("a", 34, 1))
    scheduler.add(make_request("b", 40, 2))
    assert shape(scheduler.schedule()) == [("a", 34, False), ("b", 30, False)]
    scheduler = make_scheduler(max_num_batched_tokens=64)
    scheduler.add(make_request("a", 4, 1))
    step(scheduler)
    scheduler.cost.observe(0, Work(100, 0, 0), 100.0)
    scheduler.cost.rates = Work(1.0, 0.1, 0.5)
    scheduler.cost.observe(1, Work(), 10.0)
    scheduler.add(make_request("b", 40, 2))
    assert shape(scheduler.schedule()) == [("a", 1, True), ("b", 16, False)]


def test_a_prompt_is_admitted_only_when_it_fits() -> None:
    scheduler = make_scheduler(num_blocks=5)
    scheduler.add(make_request("a", 12, 1))
    scheduler.add(make_request("b", 12, 2))
    scheduler.add(make_request("c", 4, 3))
    assert shape(step(scheduler)) == [("a", 12, False)]  # first come, first served: c does not overtake b
    assert waiting(scheduler) == ["b", "c"]


def test_the_latest_arrival_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("a", 7, 1, max_tokens=20, ignore_eos=True))
    scheduler.add(make_request("b", 7, 2, max_tokens=5))
    step(scheduler)
    step(scheduler)  # both now hold 8 tokens: two blocks each
    batch = step(scheduler)
    assert shape(batch) == [("a", 1, True)]
    assert batch.preempted == 1
    b = scheduler.waiting.ready[False][0]
    assert (b.id, b.status, b.block_table, b.num_output_tokens) == ("b", RequestStatus.WAITING, [], 2)
    assert scheduler.blocks.num_cached >= 1  # its full blocks stay until somebody needs them


def test_max_num_seqs() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for i in range(3):
        scheduler.add(make_request(f"r{i}", 2, i))
    assert len(step(scheduler).items) == 2
    assert len(scheduler.waiting) == 1


def of_group(group: str, name: str, **params: Any) -> Request:
    ids = [random.Random(name).randrange(1, 99) for _ in range(4)]
    return Request(name, ids, SamplingParams(**{"ignore_eos": True, **params}), group=group)


def test_a_group_that_holds_all_places_gives_one_to_another() -> None:
    scheduler = make_scheduler(64, max_num_seqs=4, max_num_batched_tokens=64)
    for i in range(10):
        scheduler.add(of_group("a", f"a{i}", max_tokens=20))
    step(scheduler)
    assert [request.id for request in scheduler.running] == ["a0", "a1", "a2", "a3"]
    for name, params in (("b", {"max_tokens": 2}), ("c", {"max_tokens": 0, "prompt_logprobs": 0})):
        late, preempted = of_group(name, name, **params), 0
        scheduler.add(late)
        while late.status is not RequestStatus.FINISHED:
            preempted += step(scheduler).preempted
        assert preempted == 1
        assert scheduler.running[0].id == "a0"  # which has not ended
        step(scheduler)
        assert {request.group for request in scheduler.running} == {"a"} and len(scheduler.running) == 4
    drain(scheduler)


def test_a_free_place_goes_to_who_waits_alone_before_a_groups_many() -> None:
    scheduler = make_scheduler(64, max_num_seqs=2, max_num_batched_tokens=64)
    for i in range(6):
        scheduler.add(of_group("a", f"a{i}", max_tokens=2 + 4 * i))
    step(scheduler)
    for name in "bcd":
        scheduler.add(of_group(name, name, max_tokens=3))
    assert waiting(scheduler) == ["b", "c", "d", "a2", "a3", "a4", "a5"]
    drain(scheduler)


@pytest.mark.parametrize("scored", [False, True])
def test_single_requests_that_keep_coming_do_not_hold_back_a_group(scored: bool) -> None:
    """Four single requests wait at any time; a group of ten has its fifth part of what runs, or more."""
    params = {"max_tokens": 0, "prompt_logprobs": 0} if scored else {"max_tokens": 3}
    scheduler = make_scheduler(max_num_seqs=2)
    many = [of_group("many", f"many{i}", **params) for i in range(10)]
    for request in many:
        scheduler.add(request)
    singles = 0
    while any(request.status is not RequestStatus.FINISHED for request in many):
        while len(waiting(scheduler)) - sum(request.status is RequestStatus.WAITING for request in many) < 4:
            scheduler.add(of_group(f"single{singles}", f"single{singles}", max_tokens=3))
            singles += 1
        step(scheduler)
        assert singles <= 100
    assert singles >= 10


@pytest.mark.parametrize("priority", [0, 1])
def test_no_place_is_taken_from_a_better_priority_nor_the_only_one_of_a_group(priority: int) -> None:
    scheduler = make_scheduler(64, max_num_seqs=2, max_num_batched_tokens=64)
    groups = ("a", "a") if priority else ("a", "b")
    for i, group in enumerate(groups):
        scheduler.add(of_group(group, f"{group}{i}", max_tokens=9))
    step(scheduler)
    late = Request("late", [1, 2, 3], SamplingParams(max_tokens=2), priority=priority)
    scheduler.add(late)
    for _ in range(3):
        assert step(scheduler).preempted == 0 and late not in scheduler.running
    drain(scheduler)


def test_a_scored_prompt_needs_no_last_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 9, max_tokens=0, prompt_logprobs=0))
    batch = step(scheduler)
    assert shape(batch) == [("a", 8, False)]
    assert batch.items[0].request.finish_reason is FinishReason.LENGTH
    assert not batch.items[0].samples


def test_a_scored_prompt_that_is_all_cached_still_runs() -> None:
    scheduler = make_scheduler()
    for name in ("a", "b"):
        scheduler.add(named(name, [1] * 9, max_tokens=0, prompt_logprobs=0, first_logit_position=8))
        drain(scheduler)
    scheduler.add(named("c", [1] * 9, max_tokens=0, prompt_logprobs=0, first_logit_position=7))
    assert shape(step(scheduler)) == [("c", 4, False)]


def test_generated_blocks_are_private() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4, max_tokens=9, ignore_eos=True))
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    again = Request("b", make_request("a", 4).token_ids + [7] * 8, SamplingParams())
    scheduler.add(again)
    step(scheduler)
    assert again.num_cached_tokens == 4


def named(name: str, ids: list[int], arrival: float = 0.0, **keys: Any) -> Request:
    request_keys = {key: keys.pop(key) for key in ("priority", "cache_salt", "leader") if key in keys}
    return Request(name, ids, SamplingParams(**{"ignore_eos": True, **keys}), arrival=arrival, **request_keys)


def test_smaller_priority_goes_first_and_equal_ones_by_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1, num_blocks=16)
    for name, priority, arrival in [("a", 0, 3), ("b", 5, 1), ("c", -1, 4), ("d", 0, 2), ("e", 0, 3)]:
        scheduler.add(named(name, [1, 2], arrival, priority=priority, max_tokens=1))
    order = []
    for _ in range(5):
        order += [name for name, _, _ in shape(step(scheduler))]
    assert order == ["c", "d", "a", "e", "b"]


def test_the_victim_is_of_the_largest_priority_then_the_latest() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=64)
    for name, priority, arrival in [("a", 1, 1), ("b", 0, 2), ("c", 1, 3)]:
        scheduler.add(named(name, [ord(name)] * 7, arrival, priority=priority, max_tokens=16))
    lost: list[str] = []
    for _ in range(100):
        before = {request.id for request in scheduler.running}
        if step(scheduler).preempted:
            lost += sorted(before - {request.id for request in scheduler.running})
    assert lost[:2] == ["c", "a"]
    assert "b" not in lost


def test_a_thousand_waiting_requests_come_and_go() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_batched_tokens=64)
    generator = random.Random(0)
    requests = [named(f"r{i}", [1, 2, 3], i, priority=generator.randrange(5), max_tokens=2) for i in range(1000)]
    for request in requests:
        scheduler.add(request)
    for request in generator.sample(requests, 900):
        scheduler.finish(request, FinishReason.ABORT)
    left = [request for request in requests if request.status is not RequestStatus.FINISHED]
    assert len(scheduler.waiting) == 100
    assert waiting(scheduler) == [r.id for r in sorted(left, key=lambda r: (r.priority, r.arrival))]
    drain(scheduler)
    assert {request.finish_reason for request in left} == {FinishReason.LENGTH}


def test_prefix_blocks_are_shared_only_between_equal_salts() -> None:
    scheduler = make_scheduler()
    ids = list(range(1, 10))
    cached = []
    for i, salt in enumerate(["", "x", "x", "", "y"]):
        request = named(f"r{i}", ids, i, cache_salt=salt, max_tokens=1)
        scheduler.add(request)
        drain(scheduler)
        cached.append(request.num_cached_tokens)
    assert cached == [0, 0, 8, 8, 0]


def test_a_prefix_that_is_being_computed_is_waited_for() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10, num_blocks=64)
    prefix = list(range(1, 17))
    scheduler.add(named("a", [*prefix, 50, 51, 52, 53, 54], 1, max_tokens=1))
    scheduler.add(named("b", [*prefix, 60], 2, max_tokens=1))
    scheduler.add(named("c", [*prefix[:8], 70, 71], 3, max_tokens=1))
    scheduler.add(named("d", [80, 81], 4, max_tokens=1))
    assert shape(step(scheduler)) == [("a", 10, False)]
    assert waiting(scheduler) == ["b", "c", "d"]  # nobody has looked at them
    assert shape(step(scheduler)) == [("a", 10, False)]
    batch = step(scheduler)
    assert shape(batch) == [("a", 1, False), ("b", 1, False), ("c", 2, False), ("d", 2, False)]
    assert (batch.prefix_queries, batch.prefix_hits) == (16 + 9 + 1, 16 + 8)


def test_who_waits_for_a_prefix_does_not_hold_up_those_behind_it() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=12, num_blocks=64)
    ids = list(range(1, 10))
    scheduler.add(named("a", ids, 1, max_tokens=1))
    scheduler.add(named("b", ids, 2, max_tokens=1))
    scheduler.add(named("c", [70], 3, max_tokens=1))
    assert shape(step(scheduler)) == [("a", 9, False), ("c", 1, False)]
    assert len(scheduler.waiting) == 1
    assert shape(step(scheduler)) == [("b", 1, False)]


@pytest.mark.parametrize("end", ["the computing one fails", "is preempted", "a waiting one is aborted"])
def test_nobody_waits_for_a_prefix_that_nobody_computes_any_more(end: str) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=60, num_blocks=64)
    ids = list(range(1, 40))
    a, b, c = (named(name, ids, i, max_tokens=1) for i, name in enumerate("abc"))
    for request in (a, b, c):
        scheduler.add(request)
    batch = scheduler.schedule()
    assert (shape(batch), waiting(scheduler), len(scheduler.waiting)) == ([("a", 39, False)], [], 2)
    if end == "the computing one fails":
        scheduler.finish(a, FinishReason.ERROR)
        assert waiting(scheduler) == ["b", "c"]
        assert shape(step(scheduler)) == [("b", 39, False)]
    elif end == "is preempted":
        scheduler._preempt(a)
        assert waiting(scheduler) == ["a", "b", "c"]
        assert shape(step(scheduler)) == [("a", 39, False)]
    else:
        scheduler.finish(b, FinishReason.ABORT)
        list(scheduler.update(batch, {"a": 7}))
        assert waiting(scheduler) == ["c"]
    assert shape(step(scheduler))[-1] == ("c", 3, False)
    assert c.num_cached_tokens == 36


def test_nobody_waits_for_a_prefix_that_a_lower_priority_computes() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, num_blocks=64)
    ids = list(range(1, 30))
    scheduler.add(named("slow", ids, 1, priority=3, max_tokens=1))
    step(scheduler)
    scheduler.add(named("other", [50, 51], 2, priority=1, max_tokens=1))
    scheduler.add(named("fast", ids, 3, priority=0, max_tokens=1))
    scheduler.max_num_batched_tokens = 60
    assert ("fast", 21, False) in shape(step(scheduler))


def add_group(scheduler: Scheduler, ids: list[int], n: int, **keys: Any) -> list[Request]:
    """`n` choices of one prompt, the first of which leads."""
    leader = named("leader", ids, **keys)
    group = [leader, *(named(f"follower{i}", ids, leader=leader, **keys) for i in range(1, n))]
    for request in group:
        scheduler.add(request)
    return group


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("length", "full"), [(10, 2), (8, 2), (3, 0)])
def test_followers_take_the_prompt_over_in_the_step_that_completes_it(caching: bool, length: int, full: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6, num_blocks=64)
    scheduler.blocks.enable_prefix_caching = caching
    leader, *followers = add_group(scheduler, list(range(1, length + 1)), 4, max_tokens=3)
    assert len(scheduler.waiting) == 4
    tokens = 0
    while leader.num_output_tokens == 0:
        batch = step(scheduler)
        tokens += batch.num_prompt_tokens
        assert batch.prefix_hits == 0
    assert tokens == length
    assert shape(batch)[1:] == [(follower.id, 0, False) for follower in followers]
    tables = [request.block_table for request in (leader, *followers)]
    assert all(table[:full] == tables[0][:full] for table in tables)
    rest = [table[full:] for table in tables]
    assert [len(blocks) for blocks in rest] == [int(length % 4 > 0)] * 4
    assert len({block for blocks in rest for block in blocks}) == sum(len(blocks) for blocks in rest)
    assert batch.copies == [(rest[0][0], blocks[0]) for blocks in rest[1:] if blocks]
    assert not {copy for _, copy in batch.copies} & set(batch.new_blocks)
    assert [follower.num_output_tokens for follower in followers] == [1, 1, 1]
    drain(scheduler)
    assert scheduler.blocks.num_held == 0


def test_followers_report_their_leaders_cached_tokens() -> None:
    scheduler = make_scheduler(num_blocks=64)
    ids = list(range(1, 12))
    scheduler.add(named("before", ids, max_tokens=1))
    drain(scheduler)
    group = add_group(scheduler, ids, 3, max_tokens=2)
    batch = step(scheduler)
    assert [request.num_cached_tokens for request in group] == [8, 8, 8]
    assert (batch.prefix_queries, batch.prefix_hits) == (10, 8)  # looked up once
    drain(scheduler)


def test_followers_share_with_a_leader_that_ends_at_once() -> None:
    scheduler = make_scheduler(num_blocks=64)
    scheduler.blocks.enable_prefix_caching = False
    group = add_group(scheduler, list(range(1, 12)), 3, max_tokens=1)
    assert step(scheduler).num_prompt_tokens == 11
    assert all(request.status is RequestStatus.FINISHED for request in group)
    assert scheduler.blocks.num_free == 64


def test_followers_without_a_place_look_the_prompt_up() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_seqs=2)
    group = add_group(scheduler, list(range(1, 12)), 4, max_tokens=3)
    assert len(step(scheduler).items) == 2
    drain(scheduler)
    assert [request.num_cached_tokens for request in group] == [0, 0, 8, 8]


def test_followers_of_an_aborted_leader_share_among_themselves() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_batched_tokens=6)
    leader, *followers = add_group(scheduler, list(range(1, 12)), 4, max_tokens=3)
    step(scheduler)
    scheduler.finish(leader, FinishReason.ABORT)
    assert waiting(scheduler) == [follower.id for follower in followers]
    drain(scheduler)
    assert [follower.num_cached_tokens for follower in followers] == [4, 8, 8]


def test_a_preempted_leader_keeps_its_followers_waiting() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_batched_tokens=6)
    leader, follower = add_group(scheduler, list(range(1, 12)), 2, max_tokens=3)
    step(scheduler)
    scheduler._preempt(leader)
    assert waiting(scheduler) == ["leader"]
    step(scheduler)
    assert shape(step(scheduler))[-1] == ("follower1", 0, False)
    drain(scheduler)
    assert follower.num_output_tokens == 3


def test_a_request_that_cannot_follow_goes_its_own_way() -> None:
    """Another prompt or salt, a prompt to be scored, a leader that has begun, ended, or was never added."""
    scheduler = make_scheduler(num_blocks=64)
    ids = list(range(1, 12))
    leader = named("leader", ids, max_tokens=9)
    own = [
        named("unknown leader", ids, leader=named("never added", ids)),
        named("other prompt", ids[:-1], leader=leader),
        named("other salt", ids, leader=leader, cache_salt="x"),
        named("scored", ids, leader=leader, prompt_logprobs=0),
        named("nothing generated", ids, leader=leader, max_tokens=0, prompt_logprobs=0),
    ]
    scheduler.add(leader)
    for request in own:
        scheduler.add(request)
    assert waiting(scheduler) == ["leader", *(request.id for request in own)]
    step(scheduler)
    late = named("late", ids, leader=leader)
    scheduler.add(late)
    drain(scheduler)
    after = named("after", ids, leader=leader)
    scheduler.add(after)
    drain(scheduler)
    assert all(request.finish_reason is FinishReason.LENGTH for request in (*own, leader, late, after))


def test_equal_shapes_stand_side_by_side() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64, num_blocks=64)
    for i, length in enumerate([5, 7, 5, 6, 7, 5]):
        scheduler.add(make_request(f"r{i}", length, i))
    assert [tokens for _, tokens, _ in shape(step(scheduler))] == [5, 5, 5, 7, 7, 6]


def test_texts_of_one_length_stay_whole() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64, num_blocks=64)
    for i in range(7):
        scheduler.add(make_request(f"r{i}", 20, i, max_tokens=0, prompt_logprobs=0))
    assert [tokens for _, tokens, _ in shape(step(scheduler))] == [19, 19, 19]
    assert [tokens for _, tokens, _ in shape(step(scheduler))] == [19, 19, 19]


def test_background_work_takes_idle_steps_and_few_rows_beside_others() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_batched_tokens=64)
    for i in range(4):
        scheduler.add(named(f"job{i}", [9, i + 1, 5], i, priority=BACKGROUND, max_tokens=50, ignore_eos=True))
    assert len(step(scheduler).items) == 4
    assert len(step(scheduler).items) == 4
    scheduler.add(named("chat", [1, 2], 9, max_tokens=50, ignore_eos=True))
    assert shape(step(scheduler)) == [("chat", 2, False)]
    beside = []
    for _ in range(45):
        batch = scheduler.schedule()
        names = [item.request.id for item in batch.items]
        assert names[0] == "chat"
        beside.append(len(names) - 1)
        scheduler.observe_step(batch, 10.0 + 0.5 * beside[-1])  # three rows are more than the target's
        list(scheduler.update(batch, dict.fromkeys(names, 7)))
    assert beside[:5] == [0] * 5  # so long a step is known without them
    assert max(beside[5:]) in (2, 3) and sum(beside) > 20
    assert beside[5:].count(0) <= 4  # probes
    drain(scheduler)


def test_background_work_gives_up_slots_and_blocks() -> None:
    for limits in ({"max_num_seqs": 2}, {"num_blocks": 4}):
        scheduler = make_scheduler(**limits)
        for i in range(2):
            scheduler.add(named(f"job{i}", [9, i + 1, 5, 6, 7], i, priority=BACKGROUND, max_tokens=3, ignore_eos=True))
        step(scheduler)
        assert {request.id for request in scheduler.running} == {"job0", "job1"}
        scheduler.add(named("chat", [1, 2, 3, 4, 5, 6, 7, 8], 9, max_tokens=2, ignore_eos=True))
        batch = step(scheduler)
        assert batch.preempted and "chat" in {request.id for request in scheduler.running}
        drain(scheduler)


class Life(RuleBasedStateMachine):
    """Requests of all kinds come, run, are aborted and fail, in a cache that is too small for them."""

    BLOCKS = 12

    @initialize(budget=st.integers(1, 30), max_num_seqs=st.integers(1, 6), caching=st.booleans())
    def start(self, budget: int, max_num_seqs: int, caching: bool) -> None:
        self.scheduler = make_scheduler(
            self.BLOCKS, max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, max_model_len=4 * self.BLOCKS
        )
        self.scheduler.blocks.enable_prefix_caching = caching
        self.requests: list[Request] = []
        self.random = random.Random(0)

    @rule(
        length=st.integers(1, 30),
        family=st.integers(0, 1),
        max_tokens=st.integers(0, 12),
        priority=st.sampled_from([0, 1, BACKGROUND]),
        salt=st.sampled_from(["", "s"]),
        first=st.integers(0, 30),
        n=st.integers(1, 4),
        group=st.one_of(st.none(), st.sampled_from("abc")),
    )
    def add(
        self, length: int, family: int, max_tokens: int, priority: int, salt: str, first: int, n: int, group: str | None
    ) -> None:
        """Families share prefixes; `n` choices follow the first."""
        scored: dict[str, Any] = {} if max_tokens else {"prompt_logprobs": 0, "first_logit_position": first}
        leader = None
        for _ in range(n):
            request = Request(
                f"r{len(self.requests)}",
                [family + 1] * length,
                SamplingParams(max_tokens=max_tokens, ignore_eos=True, **scored),
                priority=priority,
                cache_salt=salt,
                leader=leader,
                group=group,
                arrival=float(len(self.requests)),
            )
            leader = leader or request
            self.requests.append(request)
            self.scheduler.add(request)

    @rule()
    def run(self) -> None:
        batch = self.scheduler.schedule()
        assert batch.items or not (self.scheduler.running or self.scheduler.waiting)
        copied = [block for _, block in batch.copies]
        for block in copied:
            assert sum(block in request.block_table for request in self.scheduler.running) == 1
        self.scheduler.observe_step(batch, self.random.uniform(1, 20))
        sampled = {item.request.id: 7 for item in batch.items if item.samples}
        deferred = {name for name in sampled if self.random.random() < 0.1}
        list(self.scheduler.update(batch, {n: t for n, t in sampled.items() if n not in deferred}, deferred=deferred))

    @rule()
    def fail(self) -> None:
        for item in self.scheduler.schedule().items:
            self.scheduler.finish(item.request, FinishReason.ERROR)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if alive := [request for request in self.requests if request.status is not RequestStatus.FINISHED]:
            self.scheduler.finish(data.draw(st.sampled_from(alive)), FinishReason.ABORT)

    @invariant()
    def everyone_and_every_block_is_somewhere(self) -> None:
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        by_status = {status: [r for r in self.requests if r.status is status] for status in RequestStatus}
        assert scheduler.running == sorted(by_status[RequestStatus.RUNNING], key=lambda r: r.order)
        assert len(scheduler.waiting) == len(by_status[RequestStatus.WAITING])
        assert len(scheduler.running) <= scheduler.max_num_seqs
        references = Counter(block for request in scheduler.running for block in request.block_table)
        assert blocks.num_held == len(references)
        assert blocks.num_free + blocks.num_cached + blocks.num_held == self.BLOCKS
        assert all(not request.block_table for request in self.requests if request not in scheduler.running)
        for request in scheduler.running:
            assert len(request.block_table) * 4 >= request.num_computed_tokens
        for request in by_status[RequestStatus.WAITING]:  # those set aside wait for somebody who is still there
            if request not in scheduler.waiting.ready[request.is_scoring]:
                alive = [r for r in self.requests if r.status is not RequestStatus.FINISHED]
                assert any(request in r.followers or (request in r.waiters and r in scheduler.running) for r in alive)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        drain(self.scheduler, 5000)
        for request in self.requests:
            assert request.status is RequestStatus.FINISHED
            if request.finish_reason is FinishReason.LENGTH:
                assert request.num_output_tokens == request.params.max_tokens
        blocks = self.scheduler.blocks
        assert (blocks.num_held, blocks.num_free + blocks.num_cached) == (0, self.BLOCKS)
        assert not self.scheduler._computing and not self.scheduler.waiting._aside
        assert not self.scheduler._turns._last and not self.scheduler._turns._count


TestLife = Life.TestCase
TestLife.settings = settings(stateful_step_count=40)


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
