"""The engine's step without HTTP, by layout, batch and context, and the least time for its bytes and operations."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lpa_model.backends.select import choose
from lpa_model.cache import bytes_per_token
from lpa_model.checkpoint import load_config, stored_weights
from lpa_model.config import CacheLayout, LPAConfig
from lpa_model.quantization import WeightType
from server.bench.floor import Machine, Work, decode_work, measure_gpu, measure_machine, prompt_work
from server.bench.stopwatch import Stopwatch
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine, build_engine
from server.engine.request import Request, SamplingParams
from server.settings import load_settings

Kind = Literal["score", "prefill", "decode"]
PARTS = ("forward", "head", "sampling", "scheduling", "detokenization")
WARM_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of work; a row of the table."""

    kind: Kind
    layout: CacheLayout
    batch: int
    context: int

    def tokens(self) -> int:
        """New tokens in all of it: a step's for `decode`."""
        return self.batch * (1 if self.kind == "decode" else self.context)

    def work(self, config: LPAConfig, cache_dtype: torch.dtype, weights: WeightType) -> Work:
        if self.kind == "decode":
            return decode_work(config, self.layout, cache_dtype, weights, self.batch, self.context)
        return prompt_work(config, weights, self.batch, self.context, self.context if self.kind == "score" else 1)


def bench_steps(
    model: Path,
    layouts: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    *,
    steps: int,
    dtype: str,
    weights: str,
    kv_cache_dtype: str,
    threads: int | None,
    device: str = "cpu",
) -> Iterator[dict[str, Any]]:
    """A row for each layout, batch, context and kind of work, as they are measured.

    `ms` is the median of the steps (`decode`), or of all steps that the prompts took together, from three runs. Where
    the engine runs one step ahead, a part is what the host does or waits for, not what the device computes meanwhile.

    Raises:
        CheckpointError, ValueError: the model or an option cannot be used.
    """
    config = load_config(model)
    chosen: list[CacheLayout] = [name for name in get_args(CacheLayout) if name in layouts]
    if unknown := set(layouts) - set(chosen):
        raise ValueError(f"layout: {min(unknown)!r} is none of {', '.join(get_args(CacheLayout))}")
    longest = max(contexts) + WARM_STEPS + steps
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"context: {max(contexts)} and {steps} steps exceed the model's {config.max_position_embeddings} positions"
        )
    case = choose(
        config, dtype=dtype, weights=weights, cache_dtype=kv_cache_dtype, stored=stored_weights(model), device=device
    ).case
    machine = None
    for layout in chosen or {"full", config.default_cache_layout()}:
        blocks = max(batches) * (-(-longest // 64) + 1)
        engine = build_engine(
            model,
            load_settings(
                dtype=dtype,
                weights=weights,
                threads=threads,
                device=device,
                kv_cache_layout=layout,
                kv_cache_dtype=kv_cache_dtype,
                max_num_seqs=max(batches),
                kv_cache_memory=blocks * 64 * bytes_per_token(config, layout, case.cache_dtype),
            ).engine_options(),
        )
        # in a thread of its own, as in the server: OpenMP's threads wait otherwise in the first one
        with ThreadPoolExecutor(1) as engine_thread:
            if machine is None and case.device.type == "cuda":
                machine = measure_gpu(case.device, case.dtype)
            machine = machine or engine_thread.submit(measure_machine, config, case.dtype).result()
            for batch in batches:
                for context in contexts:
                    rows = _bench_case(engine, machine, layout, batch, context, steps, case.cache_dtype, case.weights)
                    yield from engine_thread.submit(list, rows).result()


def _bench_case(
    engine: Engine,
    machine: Machine,
    layout: CacheLayout,
    batch: int,
    context: int,
    steps: int,
    cache_dtype: torch.dtype,
    weights: WeightType,
) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{batch}:{context}")
    config = engine.model_config

    def new_prompts() -> list[list[int]]:
        return [[rng.randrange(config.vocab_size) for _ in range(context)] for _ in range(batch)]

    def add(prompts: list[list[int]], params: SamplingParams) -> None:
        for i, ids in enumerate(prompts):
            engine.add_request(Request(f"r{i}", ids, params))

    with _watching(engine) as watch:
        kinds: dict[Kind, SamplingParams] = {
            "score": SamplingParams(max_tokens=0, prompt_logprobs=0),
            "prefill": SamplingParams(max_tokens=1, temperature=0),
        }
        for kind, params in kinds.items():
            runs = []
            for _ in range(3):
                prompts = new_prompts()
                add(prompts, params)
                runs.append(_timed(engine, watch, 1 << 30))
            case = Case(kind=kind, layout=layout, batch=batch, context=context)
            yield _row(case, case.work(config, cache_dtype, weights), machine, runs)
        # prompts that the cache knows: all sequences start together, and none is done before the last one starts
        add(prompts, SamplingParams(max_tokens=WARM_STEPS + steps + 1, temperature=0, ignore_eos=True))
        while any(request.num_output_tokens <= WARM_STEPS for request in engine.scheduler.running) or (
            engine.scheduler.waiting
        ):
            engine.step()
        engine.take_stats()
        runs = [_timed(engine, watch, 1) for _ in range(steps - 1)]
        stats = engine.take_stats()
        case = Case(kind="decode", layout=layout, batch=batch, context=context)
        row = _row(case, case.work(config, cache_dtype, weights), machine, runs)
        yield row | {"steps": stats.steps, "steps_ahead": stats.steps_ahead, "held_tokens": dict(stats.held)}
        engine.abort_all()
        while engine.has_work:  # a step is in flight
            engine.step()


def _timed(engine: Engine, watch: Stopwatch, max_steps: int) -> dict[str, float]:
    """Seconds of up to `max_steps` steps, in all and by part."""
    watch.clear()
    started = time.perf_counter()
    for _ in range(max_steps):
        engine.step()
        if not engine.has_work:
            break
    total, spent = time.perf_counter() - started, watch.seconds
    parts = {"forward": spent["forward"], "head": spent["head"], "detokenization": spent["detokenization"]}
    parts["sampling"] = spent["run"] - spent["forward"] - spent["head"]  # what else the runner does is counted here
    parts["scheduling"] = total - spent["run"] - spent["detokenization"]
    return {"total": total, **parts}


@contextlib.contextmanager
def _watching(engine: Engine) -> Iterator[Stopwatch]:
    watch, runner = Stopwatch(), engine.runner
    with (
        watch.watch(runner, "submit", "run"),
        watch.watch(runner, "collect", "run"),
        watch.watch(runner.backend, "submit", "forward"),
        # within the forward pass where that ends with sampling
        contextlib.nullcontext() if engine.ahead else watch.watch(runner.backend, "head", "head"),
        watch.watch(Detokenizer, "append", "detokenization"),
    ):
        yield watch


def _row(case: Case, work: Work, machine: Machine, runs: list[dict[str, float]]) -> dict[str, Any]:
    total = statistics.median(run["total"] for run in runs)
    floor = work.seconds(machine)
    return {
        "kind": case.kind,
        "layout": case.layout,
        "batch": case.batch,
        "context": case.context,
        "ms": 1e3 * total,
        "tokens_per_s": case.tokens() / total,
        "floor_ms": 1e3 * floor,
        "gap": total / floor,
        "share_of_floor": floor / total,
        "bytes": work.bytes,
        "operations": work.operations,
        "bandwidth_gb_per_s": machine.bandwidth / 1e9,
        "gemm_gflops": machine.gemm / 1e9,
        "parts_ms": {part: 1e3 * statistics.median(run[part] for run in runs) for part in PARTS},
    }


def print_rows(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print a table row by row as it is measured; returns the rows."""
    from rich.live import Live
    from rich.table import Table

    from server.bench.report import stdout_console

    table = Table()
    console = stdout_console()
    table.add_column("kind", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    for name in ("batch", "context", "ms", "tokens/s", "floor ms", "gap", "% by part"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = []
    first = next(rows)  # a mistake shows before the table does
    with Live(table, console=console):
        for row in itertools.chain([first], rows):
            shown.append(row)
            table.add_row(
                row["kind"],
                row["layout"],
                str(row["batch"]),
                str(row["context"]),
                *(f"{row[name]:,.1f}" for name in ("ms", "tokens_per_s", "floor_ms")),
                f"{row['gap']:.1f}x",
                "/".join(f"{100 * row['parts_ms'][part] / row['ms']:.0f}" for part in PARTS),
            )
    if not console.is_terminal:
        console.line()  # Live ends its last line on a terminal only
    steps = sum(row.get("steps", 0) for row in shown)
    if ahead := sum(row.get("steps_ahead", 0) for row in shown):
        console.print(f"{ahead} of {steps} decode steps ran while the next one was scheduled.", highlight=False)
    console.print(
        f"Parts: {', '.join(PARTS)}. This run's floors: {row['bandwidth_gb_per_s']:.1f} GB/s, "
        f"{row['gemm_gflops']:,.0f} GFLOP/s.",
        highlight=False,
    )
    return shown
