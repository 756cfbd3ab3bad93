"""How much of a step goes to HTTP, detokenization and scheduling while streams run over real sockets."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from server.bench.local import local_server
from server.bench.stopwatch import replaced
from server.engine.engine import Engine, build_engine
from server.engine.model_runner import ModelRunner
from server.engine.request import EngineStats, Request, SamplingParams
from server.metrics import Metrics
from server.settings import Settings


class Call(NamedTuple):
    """One call of the model: when it began and ended, how many streams it served, what the event loop had used."""

    began: float
    ended: float
    decodes: int
    loop_cpu: float


def bench_overhead(settings: Settings, streams: int, input_len: int, output_len: int) -> dict[str, Any]:
    """Serve in this process, drive `streams` completions from another one, and look at the steps in which all stream.

    `step_ms` is the median time from one call of the model to the next, `run_ms` that of the call (model and
    sampling), `outside` the share of the rest: scheduling, detokenization, delivery, waiting for the event loop.
    `metrics_ms` is the mean that the metrics of a step take of the event loop's CPU, `metrics` its share of `step_ms`.
    `event_loop_cpu_ms` is what the event loop's thread (HTTP) computes in a step, beside the model. `alone_ms` is the
    step of an engine of its own with the same work and no HTTP; `slowdown` is step_ms / alone_ms.

    Raises:
        ValueError: the server did not start, the client failed, or no two steps in a row had all the streams.
    """
    calls, metrics = _over_http(settings, streams, input_len, output_len)
    pairs = [(a, b) for a, b in itertools.pairwise(calls) if a.decodes == b.decodes == streams]
    if not pairs:
        raise ValueError(f"streams: no two steps in a row had all {streams}; ask for longer outputs")
    step = statistics.median(b.began - a.began for a, b in pairs)
    run = statistics.median(a.ended - a.began for a, _ in pairs)
    engine = build_engine(settings.model, settings.engine_options())
    with ThreadPoolExecutor(1) as engine_thread:  # as in the server: OpenMP's threads wait otherwise in the first one
        alone = engine_thread.submit(_alone, engine, streams, input_len, output_len).result()
    return {
        "streams": streams,
        "steps": len(pairs),
        "step_ms": 1e3 * step,
        "run_ms": 1e3 * run,
        "outside": statistics.median(1 - (a.ended - a.began) / (b.began - a.began) for a, b in pairs),
        "metrics_ms": 1e3 * metrics,
        "metrics": metrics / step,
        "event_loop_cpu_ms": 1e3 * statistics.fmean(b.loop_cpu - a.loop_cpu for a, b in pairs),
        "alone_ms": 1e3 * alone,
        "slowdown": step / alone,
    }


def _over_http(settings: Settings, streams: int, input_len: int, output_len: int) -> tuple[list[Call], float]:
    """The calls of the model, and the mean seconds of CPU that the metrics of a step take."""
    with (
        _timed_metrics() as seconds,
        local_server(settings) as local,
        _recording(time.pthread_getcpuclockid(local.loop_thread)) as calls,
    ):
        drive(local.url, local.server.engine.model_config.vocab_size, streams, input_len, output_len)
    return calls, statistics.fmean(seconds)


@contextlib.contextmanager
def _timed_metrics() -> Iterator[list[float]]:
    """Seconds of CPU that each report of the engine takes, of servers made in this context."""
    seconds: list[float] = []
    observe = Metrics.observe

    def timed(self: Metrics, stats: EngineStats) -> None:
        began = time.thread_time()
        observe(self, stats)
        seconds.append(time.thread_time() - began)

    with replaced(Metrics, "observe", timed):
        yield seconds


@contextlib.contextmanager
def _recording(loop_clock: int) -> Iterator[list[Call]]:
    calls: list[Call] = []
    run = ModelRunner.run

    def recorded(self: ModelRunner, batch: Any) -> Any:
        began, loop_cpu = time.perf_counter(), time.clock_gettime(loop_clock)
        result = run(self, batch)
        decodes = len(batch.items) if batch.num_prompt_tokens == 0 else 0
        calls.append(Call(began, time.perf_counter(), decodes, loop_cpu))
        return result

    with replaced(ModelRunner, "run", recorded):
        yield calls


def drive(url: str, vocab_size: int, streams: int, input_len: int, output_len: int) -> dict[str, Any]:
    """A round of `lpa bench serve` in a process of its own, so that its CPU time does not count as the event loop's.

    Raises:
        ValueError: it failed, or one of its requests did.
    """
    sizes = {
        "--concurrency": streams,
        "--requests": streams,
        "--input-len": input_len,
        "--output-len": output_len,
        "--rounds": 1,
        "--vocab-size": vocab_size,
    }
    command = [sys.executable, "-m", "server.cli", "bench", "serve", url, "--json"]
    command += [str(word) for pair in sizes.items() for word in pair]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the client failed: {done.stderr}")
    report = json.loads(done.stdout)["servers"][0]
    if report["errors"]:
        raise ValueError(f"a request failed: {report['errors'][0]}")
    found: dict[str, Any] = report["rounds"][0]
    return found


def _alone(engine: Engine, streams: int, input_len: int, output_len: int) -> float:
    """Median seconds of a step with all streams, the engine called in a loop."""
    rng = random.Random(0)
    params = SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True)
    for i in range(streams):
        ids = [rng.randrange(engine.model_config.vocab_size) for _ in range(input_len)]
        engine.add_request(Request(f"r{i}", ids, params))
    times = []
    while engine.has_work:
        streaming = sum(request.num_output_tokens > 0 for request in engine.scheduler.running)
        began = time.perf_counter()
        engine.step()
        if streaming == streams:
            times.append(time.perf_counter() - began)
    return statistics.median(times)
