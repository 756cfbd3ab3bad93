"""The engine thread: many streams, cancellation, drain, failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.engine.request import EngineStats, Request, RequestOutput, SamplingParams
from server.errors import ContextLength, EngineError, InvalidRequest, QueueFull, Unavailable
from tests.test_engine import make_engine, prompt


@asynccontextmanager
async def started(engine: Engine, **options: Any) -> AsyncIterator[tuple[AsyncEngine, list[EngineStats]]]:
    stats: list[EngineStats] = []
    async_engine = AsyncEngine(engine, stats.append, **{"max_queue": 1024, **options})
    await async_engine.start()
    try:
        yield async_engine, stats
    finally:
        await async_engine.stop(5.0)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


async def collect(engine: AsyncEngine, name: str, ids: list[int], params: SamplingParams) -> list[RequestOutput]:
    return [output async for output in one(engine, name, ids, params)]


async def one(engine: AsyncEngine, name: str, ids: list[int], params: SamplingParams) -> AsyncGenerator[RequestOutput]:
    """The outputs of a single sequence."""
    async with aclosing(engine.generate([Request(name, ids, params)])) as outputs:
        async for index, output in outputs:
            assert index == 0
            yield output


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true in ten minutes")


def all_blocks_free(engine: Engine) -> bool:
    blocks = engine.scheduler.blocks
    return blocks.num_held == 0 and blocks.num_free + blocks.num_cached == blocks.num_blocks


async def test_thirty_two_streams_of_different_lengths(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint)
    async with started(engine) as (async_engine, stats):
        tasks = [collect(async_engine, f"r{i}", prompt(i, 3 + i), greedy(5 + i)) for i in range(32)]
        outputs = await asyncio.gather(*tasks)
    assert [sum(len(o.token_ids) for o in out) for out in outputs] == [5 + i for i in range(32)]
    assert all_blocks_free(engine)
    assert max(report.num_running for report in stats) > 8
    assert stats[-1].num_running == stats[-1].num_waiting == 0
    assert sum(report.generation_tokens for report in stats) == sum(5 + i for i in range(32))
    assert sum(len(report.time_to_first_token) for report in stats) == 32


async def test_a_closed_stream_frees_its_blocks(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint)
    async with started(engine) as (async_engine, _):
        async with aclosing(one(async_engine, "x", prompt(1, 20), greedy(100))) as stream:
            async for _ in stream:
                break
            assert engine.scheduler.blocks.num_held > 0
        await until(lambda: all_blocks_free(engine) and not engine.has_work)


async def test_a_cancelled_consumer_frees_its_blocks(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint)
    async with started(engine) as (async_engine, _):
        task = asyncio.create_task(collect(async_engine, "x", prompt(1, 20), greedy(100)))
        await until(lambda: engine.scheduler.blocks.num_held > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: all_blocks_free(engine) and not engine.has_work)


async def test_refusals_come_before_the_queue(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint, max_num_seqs=1)
    async with started(engine, max_queue=1) as (async_engine, _):
        with pytest.raises(InvalidRequest, match=r"prompt\[3\]: is empty"):
            async_engine.validate([], 1, "prompt[3]", "max_tokens")
        with pytest.raises(ContextLength, match="128 tokens and n 1 make 129"):
            async_engine.validate(prompt(1, 128), 1, "prompt", "n")
        streams = [one(async_engine, f"r{i}", prompt(i, 5), greedy(100)) for i in range(2)]
        for stream in streams[:1]:
            await anext(stream)
        second = asyncio.create_task(anext(streams[1]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="1 requests"):
            await collect(async_engine, "third", prompt(3, 5), greedy(1))
        with pytest.raises(QueueFull):
            await collect(async_engine, "r0", prompt(3, 5), greedy(1))
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        with pytest.raises(InvalidRequest, match="r0"):
            await collect(async_engine, "r0", prompt(3, 5), greedy(1))
        await streams[0].aclose()


async def test_drain_lets_running_requests_finish_and_refuses_new_ones(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint)
    async_engine = AsyncEngine(engine, lambda stats: None, max_queue=1024)
    await async_engine.start()
    stream = one(async_engine, "x", prompt(1, 10), greedy(60))
    first = await anext(stream)
    stop = asyncio.create_task(async_engine.stop(20.0))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await collect(async_engine, "late", prompt(2, 5), greedy(1))
    assert len(first.token_ids) + sum([len(output.token_ids) async for output in stream]) == 60
    await stop


async def test_drain_time_out_cuts_off_what_is_left(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint)
    async_engine = AsyncEngine(engine, lambda stats: None, max_queue=1024)
    await async_engine.start()
    stream = one(async_engine, "x", prompt(1, 10), greedy(110))
    await anext(stream)
    await async_engine.stop(0.0)
    with pytest.raises(Unavailable):
        async for _ in stream:
            pass
    assert all_blocks_free(engine)


async def test_a_failing_step_fails_its_requests_and_three_in_a_row_end_the_engine(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_checkpoint)
    real, failing = engine.runner.run, False

    def run(batch: Any) -> Any:
        if failing:
            raise RuntimeError("out of paper")
        return real(batch)

    monkeypatch.setattr(engine.runner, "run", run)
    deaths: list[bool] = []
    async with started(engine, on_death=lambda: deaths.append(True)) as (async_engine, _):
        for _ in range(2):  # two failures, a success, two failures: it lives
            failing = True
            for i in range(2):
                with pytest.raises(EngineError, match="out of paper"):
                    await collect(async_engine, f"bad{i}", prompt(1, 5), greedy(3))
            failing = False
            good = await collect(async_engine, "good", prompt(1, 5), greedy(3))
            assert sum(len(output.token_ids) for output in good) == 3
        assert async_engine.alive
        failing = True
        for i in range(3):
            with pytest.raises(EngineError):
                await collect(async_engine, f"bad{i}", prompt(1, 5), greedy(3))
        await until(lambda: not async_engine.alive)
        with pytest.raises(Unavailable):
            await collect(async_engine, "after", prompt(1, 5), greedy(3))
        assert deaths == [True]
    assert all_blocks_free(engine)


async def test_the_engine_thread_warms_up_before_requests_are_taken(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, threads = make_engine(tiny_checkpoint), list[str]()
    monkeypatch.setattr(engine.runner.backend, "warm_up", lambda *_: threads.append(threading.current_thread().name))
    async with started(engine) as (async_engine, _):
        assert async_engine.accepting and threads == ["engine"]
        await collect(async_engine, "x", prompt(1, 5), greedy(2))
    assert threads == ["engine"]


async def test_what_cannot_warm_up_does_not_start(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warm_up(*_: int) -> None:
        raise RuntimeError("no kernel image")

    engine = make_engine(tiny_checkpoint)
    monkeypatch.setattr(engine.runner.backend, "warm_up", warm_up)
    async_engine = AsyncEngine(engine, lambda stats: None, max_queue=1)
    with pytest.raises(RuntimeError, match="no kernel image"):
        await async_engine.start()
    assert not async_engine.accepting
