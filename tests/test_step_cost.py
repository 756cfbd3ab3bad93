"""What steps cost and what prompts may take of them, on a machine whose true costs are known. Time is simulated."""

from __future__ import annotations

import itertools
import random
from statistics import median
from typing import Any

import pytest

from server.engine.block_manager import BlockManager
from server.engine.request import FinishReason, Request, SamplingParams
from server.engine.scheduler import ScheduledBatch, Scheduler
from server.engine.step_cost import MIN_CHUNK, PromptBudget, StepCost, Work


class Machine:
    """A scheduler on a machine of known speed: `schedule`, a simulated step, `update`. Milliseconds."""

    def __init__(
        self, speed: float = 1.0, noise: float = 0.1, hiccups: float = 0.0, pass_ms: float = 0.0, **options: Any
    ) -> None:
        defaults = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "step_budget_ms": 1e9, "max_model_len": 2048}
        self.scheduler = Scheduler(BlockManager(4096, 64, False), eos_token_ids={0}, **{**defaults, **options})
        self.speed, self.noise, self.hiccups, self.pass_ms = speed, noise, hiccups, pass_ms
        self.random = random.Random(0)
        self.latencies: list[float] = []  # of steps with decodes
        self.prompt_tokens: list[int] = []  # in those steps

    def time_of(self, batch: ScheduledBatch) -> float:
        """Reading the weights, rows, context and scored rows, disturbed; a share of `hiccups` takes twice as long."""
        ms = 8.0 if batch.items else 0.0
        if batch.num_prompt_tokens:
            ms += self.pass_ms
        for request, num_tokens, is_decode in batch.items:
            context = request.num_computed_tokens
            if is_decode:
                ms += 0.5 + 0.001 * context
            else:
                scored = request.num_scored(context, num_tokens)
                ms += 0.3 * num_tokens + 0.008 * context + 0.0001 * context * num_tokens + 0.25 * scored
        ms *= self.random.uniform(1 - self.noise, 1 + self.noise)
        return self.speed * ms * (2 if self.random.random() < self.hiccups else 1)

    def step(self) -> ScheduledBatch:
        batch = self.scheduler.schedule()
        ms = self.time_of(batch)
        if any(item.is_decode for item in batch.items):
            self.latencies.append(ms)
            self.prompt_tokens.append(batch.num_prompt_tokens)
        self.scheduler.observe_step(batch, ms)
        list(self.scheduler.update(batch, {item.request.id: 7 for item in batch.items if item.samples}))
        return batch

    def add(self, name: str, length: int, max_tokens: int) -> Request:
        scored = 0 if max_tokens == 0 else None
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=scored)
        request = Request(name, [5] * length, params)
        self.scheduler.add(request)
        return request

    def stream(self, count: int, prompt: int = 128) -> float:
        """Start streams that do not end soon; returns their median latency alone."""
        for i in range(count):
            self.add(f"stream{i}", prompt, 1900)
        while self.scheduler.waiting or any(request.num_output_tokens == 0 for request in self.scheduler.running):
            self.step()
        self.latencies.clear()
        for _ in range(50):
            self.step()
        alone = median(self.latencies)
        self.latencies.clear()
        self.prompt_tokens.clear()
        return alone


@pytest.mark.parametrize("speed", [0.05, 1.0, 5.0])
@pytest.mark.parametrize("streams", [1, 8, 32])
def test_scoring_at_most_doubles_the_median_latency_of_streams(streams: int, speed: float) -> None:
    machine = Machine(speed, hiccups=0.02)
    alone = machine.stream(streams)
    for i in range(30):
        machine.add(f"text{i}", 512, 0)
    while len(machine.latencies) < 300:
        machine.step()
    assert median(machine.latencies) < 2.1 * alone
    assert median(machine.latencies[20:]) > 1.6 * alone, "scoring does not get its share"


@pytest.mark.parametrize("speed", [0.05, 1.0, 5.0])
@pytest.mark.parametrize("streams", [8, 32])
def test_a_long_prompt_keeps_the_99th_percentile_within_three_medians(streams: int, speed: float) -> None:
    machine = Machine(speed, noise=0.07)
    alone = machine.stream(streams)
    for name in ("a", "b"):  # what the first one's context taught must not mislead the second one's beginning
        long = machine.add(name, 1500, 1)
        while long.num_output_tokens == 0:
            machine.step()
    assert sorted(machine.latencies)[int(0.99 * len(machine.latencies))] < 3 * alone
    assert median(machine.latencies) > 2 * alone, "the prompt does not get its share"
    assert sum(machine.prompt_tokens) == 3000
    idle = [i for i, tokens in enumerate(machine.prompt_tokens) if tokens == 0]
    assert all(b - a > 1 for a, b in itertools.pairwise(idle)), "two steps in a row without progress"


@pytest.mark.parametrize("pass_ms", [3.0, 6.0])
def test_work_that_makes_a_step_dear_comes_in_portions_that_are_worth_it(pass_ms: float) -> None:
    machine = Machine(noise=0.07, pass_ms=pass_ms)
    alone = machine.stream(8)
    long = machine.add("long", 1500, 1)
    while long.num_output_tokens == 0:
        machine.step()
    assert sorted(machine.latencies)[int(0.99 * len(machine.latencies))] < 3 * alone
    machine.latencies.clear()
    machine.prompt_tokens.clear()
    for i in range(30):
        machine.add(f"text{i}", 512, 0)
    while len(machine.latencies) < 300:
        machine.step()
    assert median(machine.latencies) < 2.1 * alone
    portions = [tokens for tokens in machine.prompt_tokens[50:] if tokens]
    assert 0.55 * median(portions) > pass_ms / 2, "a token costs 0.55 ms; half of the time should go into tokens"


def test_many_waiting_prompts_count_more_than_few_streams() -> None:
    machine = Machine(noise=0, step_budget_ms=50.0)
    alone = machine.stream(2)
    for i in range(20):
        machine.add(f"prompt{i}", 128, 200)
    for _ in range(5):
        machine.step()
    assert alone + 35 < max(machine.latencies) < alone + 51


def test_prompts_pass_scoring_that_has_used_its_share() -> None:
    machine = Machine()
    machine.stream(8)
    for i in range(200):
        machine.add(f"text{i}", 512, 0)
    for _ in range(20):
        machine.step()
    prompt = machine.add("prompt", 128, 10)
    for _ in range(30):
        machine.step()
    assert prompt.num_output_tokens > 0
    assert machine.scheduler.waiting.ready[True]


def test_both_stay_under_step_budget_ms() -> None:
    machine = Machine(noise=0, step_budget_ms=6.0)
    alone = machine.stream(8)
    machine.add("long", 200, 1)
    machine.add("text", 200, 0)
    for _ in range(30):
        machine.step()
    assert alone + 4.0 < max(machine.latencies) < alone + 6.0 + 1.0  # contexts grow meanwhile


def test_without_streams_prompts_take_everything() -> None:
    machine = Machine(step_budget_ms=0.001)
    for i in range(5):
        machine.add(f"p{i}", 1000, 1)
    assert machine.step().num_prompt_tokens == 2000
    assert machine.scheduler.cost.rates is not None
    assert machine.step().num_prompt_tokens == 2000


def test_the_first_chunk_is_learned_from_however_small() -> None:
    """From a prompt of three tokens, which took 8.9 ms, to chunks that use the share."""
    machine = Machine(noise=0)
    machine.stream(1, prompt=3)
    machine.add("long", 1000, 1)
    for _ in range(40):
        machine.step()
    assert machine.prompt_tokens[0] < 30
    assert machine.latencies[-1] > 1.8 * min(machine.latencies)


def test_estimates_follow_a_change_of_the_number_of_streams() -> None:
    machine = Machine(noise=0)
    machine.stream(32)
    for i in range(200):
        machine.add(f"text{i}", 512, 0)
    for _ in range(100):
        machine.step()
    for request in machine.scheduler.running[1:32]:
        machine.scheduler.finish(request, FinishReason.ABORT)
    machine.latencies.clear()
    for _ in range(60):
        machine.step()
    assert max(machine.latencies) < 2.1 * min(machine.latencies)


def test_a_decode_only_step_is_asked_for_when_none_like_it_is_known_but_never_twice_in_a_row() -> None:
    cost = StepCost()
    assert [cost.probe_due(4) for _ in range(6)] == [True, False, True, False, True, False]
    cost.observe(4, Work(), 10.0)
    asked = [cost.probe_due(4) for _ in range(10)]
    assert asked == [False] * 4 + [True] + [False] * 4 + [True]
    assert not cost.probe_due(5)
    assert cost.probe_due(8) and not cost.probe_due(8)


def test_one_wild_step_moves_little() -> None:
    cost = StepCost()
    for _ in range(5):
        cost.observe(8, Work(), 10.0)
    cost.observe(0, Work(100, 0, 0), 30.0)
    for _ in range(50):
        cost.observe(8, Work(30, 0, 0), 19.0)
    assert cost.work_ms(Work(100, 0, 0)) == pytest.approx(30.0, rel=0.01)
    cost.observe(8, Work(30, 0, 0), 5000.0)
    cost.observe(8, Work(), 5000.0)
    assert cost.work_ms(Work(100, 0, 0)) < 40
    assert cost.decode_ms(8) == 10.0


def test_kinds_of_work_are_told_apart() -> None:
    """Steps of mixed work with rates 0.3, 0.01 and 0.5, and 40 for each, teach all four."""
    cost, generator = StepCost(), random.Random(1)
    cost.observe(0, Work(500, 0, 0), 300.0)
    cost.observe(8, Work(), 10.0)
    for _ in range(2000):
        work = Work(generator.uniform(10, 600), generator.choice([0, 20000]), generator.choice([0, 300]), 1)
        cost.observe(8, work, 0.3 * work.tokens + 0.01 * work.context + 0.5 * work.scored + 50)
    assert cost.rates == pytest.approx((0.3, 0.01, 0.5, 40), rel=0.1)


def test_rates_come_back_after_nonsense() -> None:
    """Times without any relation to the work, as on a machine that others use up, and then true ones."""
    cost, generator = StepCost(), random.Random(2)
    for _ in range(500):
        work = Work(generator.uniform(1, 500), generator.uniform(0, 20000), generator.uniform(0, 300))
        cost.observe(0, work, generator.choice([0.01, 1.0, 30.0, 10000.0]))
    for _ in range(500):
        work = Work(generator.uniform(300, 600), generator.choice([0, 20000]), generator.choice([0, 300]))
        cost.observe(0, work, 0.3 * work.tokens + 0.01 * work.context + 0.5 * work.scored)
    assert cost.rates is not None
    assert cost.rates[:3] == pytest.approx((0.3, 0.01, 0.5), rel=0.1)


def make_request(length: int, max_tokens: int = 1) -> Request:
    return Request("x", [1] * length, SamplingParams(max_tokens=max_tokens))


def test_a_text_that_fits_the_next_step_whole_is_not_begun_with_the_little_that_is_left() -> None:
    budget = PromptBudget(StepCost(), 100)
    budget.spend(make_request(80), 0, 80)
    assert budget.affordable(make_request(20), 0, 20) == 20
    assert budget.affordable(make_request(101), 0, 101) == 20  # no step holds it
    assert budget.affordable(make_request(50), 0, 50) == 0
    assert not budget.open_kinds
    budget = PromptBudget(StepCost(), 100)
    budget.spend(make_request(60), 0, 60)
    assert budget.affordable(make_request(50), 0, 50) == 40  # not so little


def test_the_first_prompt_gets_some_whatever_scoring_took() -> None:
    cost = StepCost()
    cost.observe(0, Work(100, 0, 0), 100.0)
    budget = PromptBudget(cost, 1000, 16.0, 9.0)
    text, prompt = make_request(51, 0), make_request(50)
    assert budget.affordable(text, 0, 50) == 9
    budget.spend(text, 0, 30)  # more than there was
    assert budget.open_kinds == {False}
    assert budget.affordable(prompt, 0, 50) == MIN_CHUNK
    budget.spend(prompt, 0, MIN_CHUNK)
    assert not budget.open_kinds
