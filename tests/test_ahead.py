"""One step ahead: the same outputs as step by step, to the bit, whatever arrives, stops, is cancelled or preempted."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
from torch import Tensor

from lpa_model.backends.cuda import twins
from lpa_model.backends.cuda.backend import CudaBackend
from lpa_model.backends.cuda.rows import Decodes, Prompts
from lpa_model.backends.cuda.weights import Grouped, KeyUp, Matrix, PerHead
from server.engine.engine import Engine, StepFailed
from server.engine.hidden_states import HiddenSpec
from server.engine.request import (
    BACKGROUND,
    FinishReason,
    GrammarSpec,
    Request,
    RequestOutput,
    SamplingParams,
    hidden_request,
    scoring_request,
)
from server.engine.scheduler import ScheduledBatch
from tests.test_engine import drain, greedy, ids_of, make_engine, prompt
from tests.test_scheduler import Life, make_request, make_scheduler
from tests.tiny import END_OF_TEXT_ID, tiny_config, write_checkpoint

# Twins whose every row is computed by itself, so that its bits depend on it alone, as a GPU's kernels may promise.


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    rows = x.reshape(-1, 1, x.shape[-1])
    return torch.cat([twins.linear(row, matrix) for row in rows]).view(*x.shape[:-1], -1)


def grouped_linear(x: Tensor, grouped: Grouped) -> Tensor:
    return torch.cat([twins.grouped_linear(row, grouped) for row in x.split(1)])


def per_head(x: Tensor, up: PerHead, out: Tensor) -> None:
    for row, its in zip(x.split(1), out.split(1), strict=True):
        twins.per_head(row, up, its)


def attend(query: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query [H, width], keys and values [T, H, width] -> [H, width of the values]."""
    k, v = (x.repeat_interleave(len(query) // x.shape[1], 1).float().contiguous() for x in (k, v))
    weights = (torch.einsum("hw,thw->ht", query.float(), k) * scale).softmax(-1)
    return torch.einsum("ht,thw->hw", weights, v)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, decodes: Decodes, scale: float, rebuilt: KeyUp | None, out: Tensor
) -> None:
    assert rebuilt is None
    for i, length in enumerate(decodes.lengths.tolist()):
        if length:
            table = decodes.tables[i, : -(-length // keys.shape[2])].long()
            k, v = (pool[table].transpose(1, 2).flatten(0, 1)[:length] for pool in (keys, values))
            out[i] = attend(q[i], k, v, scale)


def prompt_attention(
    q: Tensor,
    keys: Tensor,
    key_tables: Tensor,
    values: Tensor,
    value_tables: Tensor,
    prompts: Prompts,
    scale: float,
    out: Tensor,
) -> None:
    for i, (first, context, length) in enumerate(prompts.spans.tolist()):
        blocks = -(-(context + length) // keys.shape[2])
        k = keys[key_tables[i, :blocks].long()].transpose(1, 2).flatten(0, 1)
        v = values[value_tables[i, :blocks].long()].transpose(1, 2).flatten(0, 1)
        for row in range(length):
            seen = context + row + 1
            out[first + row] = attend(q[first + row], k[:seen], v[:seen], scale).to(out.dtype)


BY_ROW = twins.TWINS._replace(
    linear=linear,
    grouped_linear=grouped_linear,
    per_head=per_head,
    decode_attention=decode_attention,
    prompt_attention=prompt_attention,
)


@pytest.fixture
def by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPA_CUDA", "twins")
    monkeypatch.setattr("lpa_model.backends.select.TWINS", BY_ROW)
    monkeypatch.setattr("server.engine.model_runner.MASK_GRACE", 30.0)  # so that load changes nothing


def pair(folder: Path, **options: Any) -> tuple[Engine, Engine]:
    """Two engines: one step ahead, and step by step."""
    ahead, plain = (make_engine(folder, batch_invariant=None, **options) for _ in range(2))
    assert ahead.ahead and isinstance(ahead.runner.backend, CudaBackend)
    plain.ahead = False
    for engine in (ahead, plain):
        engine.scheduler.recompute_decodes_one_by_one = True  # as batch invariance has it
    return ahead, plain


@dataclass(frozen=True)
class Job:
    """A request: when it comes, in steps, and after how many tokens its client leaves."""

    arrival: int
    length: int
    family: int
    kind: str
    max_tokens: int
    leave: int | None
    priority: int


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "logprobs": 2},
    "drawn": {"temperature": 0.9},
    "nucleus": {"top_p": 0.05},  # more random numbers than there are at first
    "best": {"top_k": 4, "min_p": 0.02, "logprobs": 0},
    "ends": {"logit_bias": ((END_OF_TEXT_ID, 6.0),), "ignore_eos": False, "min_tokens": 2},
    "stops": {"stop": ("a", "e", " "), "temperature": 1.5},
    "stop tokens": {"stop_token_ids": tuple(range(40, 90)), "include_stop_str_in_output": True},
    "penalties": {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "presence_penalty": -0.2},
    "bad words": {"bad_words": ((5, 6), (7,), (65, 66)), "allowed_token_ids": (5, 6, 7, 65, 66)},
    "grammar": {"grammar": GrammarSpec("regex", "[a-f]{3,6}( [0-9]{2})?", "structured_outputs"), "ignore_eos": False},
    "scored": {"prompt_logprobs": 1, "temperature": 0.7},
}


def requests_of(job: Job, number: int, model_len: int) -> list[Request]:
    ids = prompt(job.family, job.length)
    name = f"r{number}"
    if job.kind == "score":
        return [
            scoring_request(name, ids, max(1, min(job.length - 1, 3)))
            if len(ids) > 1
            else Request(name, ids, greedy(1))
        ]
    if job.kind == "hidden":
        return [hidden_request(name, ids, HiddenSpec(layers=(0, 2), positions=range(len(ids))))]
    if job.kind == "choices":
        params = SamplingParams(max_tokens=job.max_tokens, seed=number, ignore_eos=True)
        leader = Request(name, ids, params, priority=job.priority)
        more = [Request(f"{name}.{i}", ids, params, choice=i, leader=leader, priority=job.priority) for i in (1, 2)]
        return [leader, *more]
    keys = {"ignore_eos": True, "seed": number, **KINDS[job.kind]}
    longest = min(job.max_tokens, model_len - len(ids))
    return [Request(name, ids, SamplingParams(max_tokens=longest, **keys), priority=job.priority)]


def outputs_of(engine: Engine, jobs: list[Job], max_steps: int = 3000) -> dict[str, list[RequestOutput]]:
    """Every request's outputs as they came; blocks add up in the end."""
    found: dict[str, list[RequestOutput]] = defaultdict(list)
    waiting = sorted(enumerate(jobs), key=lambda entry: entry[1].arrival)
    leave: dict[str, int] = {}
    for step in range(max_steps):
        while waiting and waiting[0][1].arrival <= step:
            number, job = waiting.pop(0)
            for request in requests_of(job, number, engine.max_model_len):
                if job.leave is not None:
                    leave[request.id] = job.leave
                engine.add_request(request)
        if not (engine.has_work or waiting):
            break
        for output in engine.step() if engine.has_work else []:
            found[output.request_id].append(output)
            assert output.error is None, output.error
            if len(ids_of(found[output.request_id])) >= leave.get(output.request_id, 1 << 30):
                engine.abort(output.request_id)
    assert not engine.has_work and not waiting
    blocks = engine.scheduler.blocks
    assert blocks.num_held == 0 and blocks.num_free + blocks.num_cached == blocks.num_blocks
    assert not engine.scheduler._computing
    return found


def told(outputs: list[RequestOutput]) -> dict[str, Any]:
    """What a client learns, without when it does."""
    last = outputs[-1]
    logprobs = [(o.logprobs.logprobs, o.logprobs.top_ids, o.logprobs.top_logprobs) for o in outputs if o.logprobs]
    scored = [o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None]
    return {
        "ids": ids_of(outputs),
        "text": "".join(output.text for output in outputs),
        "reason": (last.finish_reason, last.stop_reason),
        "logprobs": logprobs,
        "prompt": [(columns.logprobs, columns.ranks, columns.top_ids) for columns in scored],
        "hidden": None if last.hidden is None else last.hidden.tolist(),
    }


jobs = st.builds(
    Job,
    arrival=st.integers(0, 25),
    length=st.sampled_from([1, 2, 7, 8, 9, 16, 30]),
    family=st.integers(0, 3),
    kind=st.sampled_from([*KINDS, "greedy", "drawn", "score", "hidden", "choices"]),
    max_tokens=st.sampled_from([1, 2, 5, 13, 30]),
    leave=st.sampled_from([None, None, None, 1, 4]),
    priority=st.sampled_from([0, 0, 1, BACKGROUND]),
)


@pytest.mark.parametrize("num_seqs", [3, 8])
def test_any_mixture_gives_the_same_outputs(by_row: None, tmp_path: Path, num_seqs: int) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    ahead, plain = pair(
        folder, max_num_seqs=num_seqs, max_num_batched_tokens=19, max_model_len=72, kv_cache_memory=66000
    )

    @settings(max_examples=settings.default.max_examples // 3, database=None)
    @given(st.lists(jobs, min_size=1, max_size=7))
    def check(mixture: list[Job]) -> None:
        found, expected = (outputs_of(engine, mixture) for engine in (ahead, plain))
        assert found.keys() == expected.keys()
        for name, theirs in expected.items():
            assert told(found[name]) == told(theirs), name

    check()
    stats, steps = ahead.take_stats(), plain.take_stats()
    assert stats.steps_ahead > 0 and steps.steps_ahead == 0
    assert stats.generation_tokens == steps.generation_tokens
    ahead.close()
    plain.close()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tiny_checkpoints: Any) -> Engine:
    monkeypatch.setenv("LPA_CUDA", "twins")
    return make_engine(tiny_checkpoints["setting2"])


def submitted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The requests of each step, as they are submitted."""
    steps: list[list[str]] = []
    submit = engine.runner.submit

    def watched(scheduled: ScheduledBatch, last: Any = None) -> Any:
        steps.append([item.request.id for item in scheduled.items])
        return submit(scheduled, last)

    monkeypatch.setattr(engine.runner, "submit", watched)
    return steps


def test_a_cpu_runs_step_by_step(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint)
    assert not engine.ahead
    engine.add_request(Request("x", prompt(1, 5), greedy(2)))
    assert [len(engine.step()), len(engine.step()), engine.has_work] == [1, 1, False]
    stats = engine.take_stats()
    assert (stats.steps, stats.steps_ahead, stats.discarded_tokens) == (2, 0, 0)


def test_the_last_token_is_known_ahead_and_an_end_costs_one_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = submitted(engine, monkeypatch)
    engine.add_request(Request("x", prompt(1, 5), greedy(4)))
    outputs = drain(engine)["x"]
    assert len(steps) == 4 and len(ids_of(outputs)) == 4
    stats = engine.take_stats()
    assert (stats.steps, stats.steps_ahead, stats.discarded_tokens, stats.generation_tokens) == (4, 3, 0, 4)
    stop = ids_of(outputs)[1]
    steps.clear()
    engine.add_request(Request("y", prompt(1, 5), greedy(9, stop_token_ids=(stop,))))
    outputs = drain(engine)["y"]
    assert len(steps) == 3 and (ids_of(outputs)[-1], outputs[-1].finish_reason) == (stop, FinishReason.STOP)
    stats = engine.take_stats()
    assert (stats.steps, stats.discarded_tokens, stats.generation_tokens) == (3, 1, 2)


def test_what_needs_its_last_token_waits_beside_others_that_do_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = submitted(engine, monkeypatch)
    engine.add_request(Request("free", prompt(1, 5), greedy(8)))
    engine.add_request(Request("held", prompt(2, 5), greedy(4, repetition_penalty=1.3)))
    drain(engine)
    assert steps == [["free", "held"], ["free"]] * 4
    stats = engine.take_stats()
    assert (stats.steps_ahead, dict(stats.held)) == (7, {"penalties": 3})
    steps.clear()
    engine.add_request(Request("held", prompt(2, 5), greedy(4, repetition_penalty=1.3)))
    drain(engine)
    assert steps == [["held"]] * 4  # alone it takes one step a token
    assert engine.take_stats().steps_ahead == 0


def test_a_request_that_leaves_in_flight(engine: Engine) -> None:
    engine.add_request(Request("y", prompt(2, 5), greedy(6)))
    alone = ids_of(drain(engine)["y"])
    engine.add_request(Request("x", prompt(1, 5), greedy(50)))
    engine.add_request(Request("y", prompt(2, 5), greedy(6)))
    found = [output for _ in range(3) for output in engine.step()]
    engine.abort("x")
    assert engine.scheduler.blocks.num_held == 1  # of y alone
    engine.add_request(Request("x", prompt(2, 5), greedy(6)))  # another one of the same name
    outputs = drain(engine)
    assert ids_of([o for o in found if o.request_id == "y"] + outputs["y"]) == alone == ids_of(outputs["x"])


@pytest.mark.parametrize("where", ["submit", "collect"])
def test_a_step_that_fails_ends_its_own_requests(engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    late = prompt(3, 9)
    engine.add_request(Request("late", late, greedy(6)))
    expected = ids_of(drain(engine)["late"])
    steps = submitted(engine, monkeypatch)
    backend: Any = engine.runner.backend
    real = getattr(backend, where)

    def broken(*arguments: Any) -> Any:
        if "late" in steps[-1]:
            raise RuntimeError("the device has gone")
        return real(*arguments)

    monkeypatch.setattr(backend, where, broken)
    engine.add_request(Request("first", prompt(1, 20), greedy(20)))
    engine.step()
    engine.add_request(Request("late", late, greedy(6)))
    with pytest.raises(StepFailed) as caught:
        for _ in range(9):
            engine.step()
    monkeypatch.setattr(backend, where, real)
    assert steps[-2:] == [["first"], ["first", "late"]]
    failed = {output.request_id for output in caught.value.outputs}
    outputs = drain(engine)
    if where == "submit":
        assert failed == {"first", "late"} and not outputs
    else:  # the step that held late was in flight, behind the one that failed: it is computed anew
        assert failed == {"first"} and ids_of(outputs["late"]) == expected


def test_all_are_ended_with_a_step_in_flight(engine: Engine) -> None:
    for i in range(3):
        engine.add_request(Request(f"r{i}", prompt(i, 5), greedy(50)))
    engine.step()
    engine.step()
    assert {output.finish_reason for output in engine.abort_all()} == {FinishReason.ABORT}
    assert engine.scheduler.blocks.num_held == 0 and engine.has_work
    assert engine.step() == [] and not engine.has_work
    engine.close()


def test_prompts_leave_time_to_what_waits_for_its_token() -> None:
    """A step without the held decode delays its next one, too."""
    scheduler = make_scheduler(200, max_num_batched_tokens=256, max_model_len=800)
    scheduler.add(make_request("held", 4, 1, max_tokens=90, ignore_eos=True, repetition_penalty=1.2))
    flight: ScheduledBatch | None = None
    chunks: list[int] = []
    for step in range(80):
        if step == 1:  # before the time of a decode alone is known
            scheduler.add(make_request("long", 700, 2))
        batch = scheduler.schedule()
        before, flight = flight, batch if batch.items else None
        if flight is not None:
            scheduler.launch(batch)
            chunks.append(batch.num_prompt_tokens)
        if before is not None:
            decodes = len(before.items) - (before.num_prompt_tokens > 0)
            scheduler.observe_step(before, 10.0 * min(1, decodes) + 0.5 * before.num_prompt_tokens)
            tokens = zip(before.items, before.samples, strict=True)
            list(scheduler.update(before, {item.request.id: 7 for item, samples in tokens if samples}))
    assert sum(chunks) == 704
    assert sum(chunk > 200 for chunk in chunks) == 1  # before that time is known


class LifeAhead(Life):
    """The scheduler alone, each step's results after the next one was launched."""

    def __init__(self) -> None:
        super().__init__()
        self.flight: tuple[ScheduledBatch, dict[str, int]] | None = None

    @rule()
    def run(self) -> None:
        """A step, and what the one before it has sampled: of each token the number of its place."""
        for request in self.requests[::3]:
            request.held_by = "grammar"
        batch, before = self.scheduler.schedule(), self.flight
        assert batch.items or before or not (self.scheduler.running or self.scheduler.waiting)
        for item in batch.items:
            assert item.num_tokens == 0 or len(item.request.block_table) * 4 >= item.request.num_computed_tokens
        sampled = {item.request.id: item.request.num_tokens for item in batch.items if item.samples}
        self.flight = None
        if batch.items:
            self.scheduler.launch(batch)
            self.flight = batch, sampled
        if before is None:
            return
        batch, sampled = before
        self.scheduler.observe_step(batch, self.random.uniform(1, 20))
        held = {item.request.id for item in batch.items if item.request.held_by}
        deferred = {name for name in sampled if name in held and self.random.random() < 0.2}
        tokens = {name: place for name, place in sampled.items() if name not in deferred}
        for request, token in list(self.scheduler.update(batch, tokens, deferred=deferred)):
            assert token is None or request.token_ids[token:] == [token]
            if token is not None and self.random.random() < 0.2:  # the device has taken it for another one
                self.scheduler.recompute(request)
        assert all(request.num_pending <= 1 for request in self.requests)

    @rule()
    def lose(self) -> None:
        """The step in flight fails, after the next one was submitted."""
        if self.flight is None:
            return
        batch = self.scheduler.schedule()
        self.scheduler.launch(batch)
        for item in self.flight[0].items:
            self.scheduler.finish(item.request, FinishReason.ERROR)
        self.scheduler.give_up(batch)
        self.flight = None

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            for _ in range(2000):
                if not (self.flight or self.scheduler.running or self.scheduler.waiting):
                    break
                self.run()
        super().teardown()


TestLifeAhead = LifeAhead.TestCase
TestLifeAhead.settings = settings(stateful_step_count=40)
