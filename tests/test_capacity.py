"""`lpa bench capacity`: against queues whose formulas are known, and against a simulation of single steps."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.capacity import MOST_REPLICAS, Steps, Workload, at_concurrency, at_rate, read_steps, replicas
from tests.test_bench import lpa
from tests.test_cli import assert_one_line
from tests.tiny import tiny_config, write_checkpoint


def steps(batches: dict[int, float], prompt_ms: float = 0.0) -> Steps:
    return Steps("full", tuple(batches), tuple(batches.values()), 192, prompt_ms, 128)


def test_a_closed_loop_by_hand() -> None:
    measured, workload = steps({1: 10.0, 8: 24.0}, prompt_ms=0.5), Workload(100, 50, 8, 0)
    found = at_concurrency(measured, workload, 4)  # a step takes 16 ms, a prompt 50 ms
    assert found["request_s"] == pytest.approx(50 * 0.016 + 4 * 0.05)
    assert found["requests_per_s"] == pytest.approx(4 / 1.0)
    assert found["output_tokens_per_s"] == pytest.approx(200)
    assert found["inter_token_ms"] == pytest.approx(16 + 3 * 50 / 50)


@given(load=st.floats(0.05, 0.95))
def test_one_slot_is_the_simplest_queue(load: float) -> None:
    """M/M/1: of rate x and service rate y, the wait is x / y / (y - x)."""
    workload = Workload(1, 10, 1, 3000)
    rate = load * 10.0  # a request takes 100 ms
    found = at_rate(steps({1: 10.0}), workload, rate)
    assert found["wait_s"] == pytest.approx(load / (10.0 - rate), rel=1e-6)
    assert found["utilisation"] == pytest.approx(load)
    assert found["inter_token_ms"] == pytest.approx(10.0)
    assert found["request_s"] == pytest.approx(found["wait_s"] + 0.1)


def test_without_a_queue_the_refused_are_erlangs() -> None:
    """M/M/c/c where sequences do not slow one another: Erlang's B formula."""
    offered, slots = 3.0, 4
    found = at_rate(steps({1: 10.0, 4: 10.0}), Workload(1, 10, slots, 0), offered * 10.0)
    blocked = 1.0
    for count in range(1, slots + 1):
        blocked = offered * blocked / (count + offered * blocked)
    assert found["refused"] == pytest.approx(blocked)
    assert found["running"] == pytest.approx(offered * (1 - blocked))


def simulated(
    step_ms: dict[int, float], output_len: int, slots: int, rate: float, requests: int
) -> tuple[float, float]:
    """Mean seconds in the queue, and mean milliseconds between tokens, step by step; lengths are geometric."""
    rng = random.Random(0)
    arrivals = deque(itertools.accumulate(rng.expovariate(rate) for _ in range(requests)))
    now, waits, running, spent, tokens = 0.0, 0.0, 0, 0.0, 0
    waiting = deque[float]()
    while arrivals or waiting or running:
        while arrivals and arrivals[0] <= now:
            waiting.append(arrivals.popleft())
        while waiting and running < slots:
            waits += now - waiting.popleft()
            running += 1
        if not running:
            now = arrivals[0]
            continue
        seconds = step_ms[running] / 1e3
        now, spent, tokens = now + seconds, spent + running * seconds, tokens + running
        running -= sum(rng.random() < 1 / output_len for _ in range(running))
    return waits / requests, 1e3 * spent / tokens


def test_the_formula_is_near_a_simulation_of_every_step() -> None:
    times, workload = {1: 10.0, 2: 11.0, 3: 12.0, 4: 13.0}, Workload(1, 40, 4, 10_000)
    rate = 0.8 * at_concurrency(steps(times), workload, 4)["requests_per_s"]
    wait, between = simulated(times, 40, 4, rate, 20_000)
    found = at_rate(steps(times), workload, rate)
    assert found["inter_token_ms"] == pytest.approx(between, rel=0.03)
    assert found["wait_s"] == pytest.approx(wait, rel=0.15)


def test_replicas_are_the_fewest_that_fit() -> None:
    measured, workload = steps({1: 10.0, 8: 24.0}, prompt_ms=0.1), Workload(100, 50, 8, 64)
    for rate in (0.5, 7.0, 90.0):
        found = replicas(measured, workload, rate, 20.0, 0.5)
        assert found["inter_token_ms"] <= 20 and found["wait_s"] <= 0.5
        if found["replicas"] > 1:
            fewer = at_rate(measured, workload, rate / (found["replicas"] - 1))
            assert fewer["inter_token_ms"] > 20 or fewer["wait_s"] > 0.5 or fewer["refused"] > 1e-3
    with pytest.raises(ValueError, match="inter-token-ms: a sequence alone takes 10"):
        replicas(measured, workload, 1.0, 5.0, 0.5)


def test_more_machines_than_are_looked_at_are_said() -> None:
    measured, workload = steps({1: 10.0}), Workload(1, 10, 1, 64)  # a machine carries less than ten a second
    most = replicas(measured, workload, 9.0 * MOST_REPLICAS, 20.0, 1.0)
    assert MOST_REPLICAS / 2 < most["replicas"] <= MOST_REPLICAS
    with pytest.raises(ValueError, match=f"take more than {MOST_REPLICAS} machines"):
        replicas(measured, workload, 10.0 * MOST_REPLICAS, 20.0, 1.0)


def test_it_reads_what_step_has_measured(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    asked = ("--batch", 1, "--batch", 4, "--context", 16, "--context", 40, "--steps", 3, "--json")
    measured = lpa("step", "--model", folder, "--layout", "full", *asked)
    assert measured.exit_code == 0, measured.output
    path = tmp_path / "steps.json"
    path.write_text(measured.stdout)
    found = read_steps(path, None, 32, 20)
    rows = {(row["kind"], row["batch"], row["context"]): row["ms"] for row in json.loads(measured.stdout)}
    assert (found.batches, found.context, found.prompt_len) == ((1, 4), 40, 40)
    assert found.decode_ms == (rows["decode", 1, 40], rows["decode", 4, 40])
    assert found.prompt_ms == pytest.approx(rows["prefill", 1, 40] / 40)
    lengths = ("--input-len", 32, "--output-len", 20, "--inter-token-ms", 1e6, "--wait-s", 1e6)
    plot = tmp_path / "capacity.svg"
    shown = lpa("capacity", path, *lengths, "--rate", 2, "--rate", 1, "--price-per-hour", 0.5, "--plot", plot)
    assert shown.exit_code == 0, shown.output
    assert "One machine, full cache" in shown.stdout and "cost a million output tokens" in shown.stdout
    assert "requests per second" in plot.read_text()
    report = json.loads(lpa("capacity", path, *lengths, "--rate", 1, "--price-per-hour", 0.5, "--json").stdout)
    assert report["machine"][-1] == at_concurrency(found, Workload(32, 20, 4, 1024), 4)
    (fleet,) = report["replicas"]
    assert fleet["cost_per_million_tokens"] == pytest.approx(1e6 * fleet["replicas"] * 0.5 / (3600 * 20))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("{", (), "not what `lpa bench step --json` writes"),
        ("[1]", (), "not what `lpa bench step --json` writes"),
        (None, (), "No such file or directory"),
        ("rows", ("--layout", "latent"), "has no decode and prefill of latent"),
        ("rows", (), "layout: {path} has full, mixed; name one"),
        ("rows", ("--layout", "full", "--slots", 9), "slots: 9 are more than the 4 sequences that were measured"),
    ],
)
def test_mistakes_are_one_line(content: str | None, options: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    if content == "rows":
        kinds = [("decode", 1), ("decode", 4), ("prefill", 1)]
        rows = [
            {"kind": kind, "batch": batch, "context": 8, "ms": 1.0, "layout": layout}
            for kind, batch in kinds
            for layout in ("full", "mixed")
        ]
        content = json.dumps(rows)
    if content is not None:
        path.write_text(content)
    assert_one_line(lpa("capacity", path, *options), re.escape(message.format(path=path)))
