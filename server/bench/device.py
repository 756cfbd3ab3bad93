"""What a GPU computes and how fast, part by part, each within its time: checks first, then measurements.

A process of its own runs the parts, since a fault of a kernel spoils the device for the process that it happened in:
after a failure the next part begins in a new one. The report is written after each part.
On a CPU the same parts run, tiny, with the kernels' twins: that tests this file, and measures nothing of a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpa_model.backends import features, select
from lpa_model.backends.base import Backend, SamplingRow
from lpa_model.backends.cuda import check
from lpa_model.batch import Batch, ScoredRows, Span
from lpa_model.cache import bytes_per_token
from lpa_model.config import PRESETS, CacheLayout, LPAConfig
from lpa_model.init import init_model, initialize
from lpa_model.model import LPAForCausalLM
from lpa_model.quantization import WeightType
from server.bench.floor import Machine, decode_work, measure_gpu
from server.bench.local import local_server
from server.engine.engine import Engine, build_engine
from server.engine.request import Request, SamplingParams
from server.settings import load_settings

BLOCK_SIZE = 64
SMALL = LPAConfig(
    architecture="setting2",
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=32,
    attention_rank=32,
    max_position_embeddings=160,
)
"""Of the checks; of the measurements on a CPU, too."""
CHECKED = {
    "setting 1": replace(SMALL, architecture="setting1"),
    "setting 2": SMALL,
    "grouped heads, biases": replace(SMALL, num_key_value_heads=2, attention_bias=True),
    "odd ranks and heads": replace(SMALL, architecture="setting1", head_dim=6, attention_rank=5, ffn_rank=7),
    "dense keys": replace(SMALL, attention_rank={"q": 8, "k": None, "v": 8, "o": 8}),
    "qk-norm": replace(SMALL, qk_norm=True),
}
LAYOUTS: tuple[CacheLayout, ...] = ("latent", "mixed", "full")
ONE_BILLION = LPAConfig(
    architecture="setting2",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    attention_rank={"q": 816, "k": 320, "v": 320, "o": 816},
    ffn_rank=1312,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
"""The shape of a LLaMA of 1.2 billion parameters, its matrices factored to 0.8 of their weights."""
MEASURED: tuple[tuple[str, CacheLayout], ...] = (
    ("lpa-370m", "latent"),
    ("lpa-370m", "full"),
    ("lpa-130m", "mixed"),
    ("lpa-130m", "latent"),
    ("lpa-130m", "full"),
    ("1.1b", "mixed"),
)
LEAST_SECONDS = 5.0  # a part is not begun with less
COMPILERS = 8  # processes
BFLOAT16_BOUND = 1e-2  # relative to the largest number: a rounding or two to 8 bits


@dataclass(frozen=True)
class Setup:
    """What a part is run on."""

    device: str
    tiny: bool  # sizes for a CPU, or for a quick look at a GPU

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter, whose products of bfloat16 are wrong."""
        return self.place.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"

    @property
    def kernels(self) -> bool:
        """Whether kernels can run."""
        return self.place.type == "cuda" or self.interpreted

    @property
    def weights(self) -> WeightType:
        """Of the measurements."""
        return "float32" if self.dtype is torch.float32 else "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        """Of the measurements."""
        return torch.float32 if self.place.type == "cpu" else torch.bfloat16

    def of(self, config: LPAConfig) -> LPAConfig:
        """A model's shape, or a small one of its kind."""
        return replace(SMALL, architecture=config.architecture) if self.tiny else config


@dataclass(frozen=True)
class Part:
    """One entry of the report; `limit` in seconds, on a GPU and with full sizes."""

    run: Callable[[Setup], dict[str, Any]]
    limit: float


def environment(setup: Setup) -> dict[str, Any]:
    """Versions, the device, its copy bandwidth and its rate of matrix products."""
    found: dict[str, Any] = {"device": setup.device, "kernels": setup.kernels, "threads": torch.get_num_threads()}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if setup.place.type == "cuda":
        facts = torch.cuda.get_device_properties(setup.place)
        found |= {"name": facts.name, "memory": facts.total_memory, "processors": facts.multi_processor_count}
    machine = speeds(setup)
    return found | {"copy_bytes_per_s": machine.bandwidth, "gemm_operations_per_s": machine.gemm}


@cache
def speeds(setup: Setup) -> Machine:
    """Bytes that a large copy reads and writes a second; operations a second of a large product."""
    sizes = {"size": 1 << 22, "side": 256} if setup.tiny else {}
    return measure_gpu(setup.place, setup.dtype, **sizes)


def operations(setup: Setup) -> dict[str, Any]:
    """Every kernel beside its twin, by model, layout and dtype: the largest difference, relative. On a GPU by several
    processes, which also compile what the parts after this one need, into Triton's cache on disk."""
    cases = [
        (setup, replace(CHECKED[name], num_hidden_layers=1), layout, dtype) for name, layout, dtype in _cases(setup)
    ]
    names = [name for name, *_ in _cases(setup)]
    if not setup.tiny:
        for name, layout in MEASURED:
            cases.append((setup, replace(_shape(name), num_hidden_layers=1), layout, setup.dtype))
            names.append(name)
    if setup.tiny:
        found = list(map(_differences, cases))
    else:
        with ProcessPoolExecutor(min(COMPILERS, len(os.sched_getaffinity(0))), get_context("spawn")) as pool:
            found = list(pool.map(_differences, cases))
    rows = [
        {
            "model": name,
            "layout": layout,
            "dtype": str(dtype),
            "worst": worst,
            "ok": max(worst.values()) < (1e-4 if dtype is torch.float32 else BFLOAT16_BOUND),
        }
        for name, (_, _, layout, dtype), worst in zip(names, cases, found, strict=True)
    ]
    compared = "kernels with twins" if setup.kernels else "twins with themselves: this device runs no kernels"
    if setup.interpreted:
        compared += ", in float32: Triton's interpreter multiplies bfloat16 wrongly"
    return {"ok": all(row["ok"] for row in rows), "compared": compared, "rows": rows}


def _differences(case: tuple[Setup, LPAConfig, CacheLayout, torch.dtype]) -> dict[str, float]:
    setup, config, layout, dtype = case
    return check.differences(
        _random(config, setup.place, dtype), layout, min(select.BLOCK_SIZES), check.operations(setup.kernels)
    )


def contract(setup: Setup) -> dict[str, Any]:
    """Texts in chunks and mixtures through the backend, against the plain forward on the CPU in float32.

    float32: log-probabilities within 1e-4. bfloat16: mean error below 1.3 of that of the plain forward in bfloat16.
    """
    rows: list[dict[str, Any]] = []
    for name, layout, dtype in _cases(setup):
        config = CHECKED[name]
        exact = _random(config, torch.device("cpu"), torch.float32)
        if dtype is torch.bfloat16:  # weights that have 8 bits
            exact = exact.to(dtype).to(torch.float32)
        texts = [
            [(7 * i * i + 3 * n) % config.vocab_size for i in range(length)] for n, length in enumerate((90, 33, 9))
        ]
        expected = torch.cat([exact.logits(exact(torch.tensor([ids]))[0]).log_softmax(-1) for ids in texts])
        found = _through(_backend(setup, config, layout, dtype), layout, texts, [70, 20, 3])
        row: dict[str, Any] = {
            "model": name,
            "layout": layout,
            "dtype": str(dtype),
            "largest": float((found - expected).abs().max()),
        }
        if dtype is torch.float32:
            row["ok"] = row["largest"] < 1e-4
        else:
            plain = _random(config, torch.device("cpu"), dtype)
            rounded = torch.cat([plain.logits(plain(torch.tensor([ids]))[0]).log_softmax(-1) for ids in texts])
            row["ratio"] = float((found - expected).abs().mean() / (rounded - expected).abs().mean())
            row["ok"] = row["ratio"] < 1.3
        rows.append(row)
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


def invariance(setup: Setup) -> dict[str, Any]:
    """Whether a text's bits are the same alone, beside others and in other chunks, where the backend says so."""
    rows = []
    kinds: dict[str, CacheLayout] = {"setting 1": "latent", "setting 2": "mixed", "odd ranks and heads": "latent"}
    for name, layout in kinds.items():
        config = CHECKED[name]
        texts = [[(5 * i * i + n) % config.vocab_size for i in range(80)] for n in range(5)]
        for dtype in {torch.float32, setup.dtype}:
            backends = [_backend(setup, config, layout, dtype, invariant=True) for _ in range(3)]
            alone = _through(backends[0], layout, texts[:1], [60])
            beside = _through(backends[1], layout, texts, [60, 10, 70, 33, 1])[: len(alone)]
            chunks = _through(backends[2], layout, texts[:1], [60], chunk=7)
            rows.append(
                {
                    "model": name,
                    "dtype": str(dtype),
                    "claimed": backends[0].batch_invariant,
                    "beside": torch.equal(alone, beside),
                    "chunks": torch.equal(alone, chunks),
                }
            )
    return {"ok": all(row["beside"] and row["chunks"] for row in rows if row["claimed"]), "rows": rows}


def seeded(setup: Setup) -> dict[str, Any]:
    """Seeded requests together and one by one: the same tokens."""
    number, length = (6, 6) if setup.tiny else (256, 32)
    with _folder(setup, setup.of(PRESETS["lpa-130m"])) as folder:
        engine = _engine(setup, folder, number, batch_invariant=setup.place.type == "cuda" or None)
        vocab = engine.model_config.vocab_size
        rng = random.Random(1)
        prompts = [[rng.randrange(vocab) for _ in range(rng.randint(4, 48))] for _ in range(number)]
        params = [
            SamplingParams(max_tokens=length, seed=i, temperature=0.9, top_p=(1.0, 0.9)[i % 2], ignore_eos=True)
            for i in range(number)
        ]
        together = _texts(engine, prompts, params)
        alone = [_texts(engine, [ids], [one])[0] for ids, one in zip(prompts, params, strict=True)]
        invariant = engine.backend.batch_invariant
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    return {"ok": same == number or not invariant, "requests": number, "same": same, "batch_invariant": invariant}


def steps(setup: Setup) -> dict[str, Any]:
    """The engine with its scheduling and sampling, without HTTP: output tokens a second, by streams, of this backend
    and of torch's operators."""
    config = setup.of(PRESETS["lpa-130m"])
    length = 8 if setup.tiny else 128
    rows: list[dict[str, Any]] = []
    kinds = [(True, None), (False, None)] + ([(True, True)] if setup.place.type == "cuda" else [])
    with _folder(setup, config) as folder:
        for (kernels, invariant), streams in itertools.product(kinds, (1, 3) if setup.tiny else (1, 32, 256)):
            with _taking(setup, kernels):
                engine = _engine(setup, folder, streams, invariant)
            tokens = length if kernels else min(length, 32)  # torch's operators are slow on a GPU
            for temperature, top_p in ((0.0, 1.0), (0.8, 0.9)):
                params = SamplingParams(
                    max_tokens=tokens, temperature=temperature, top_p=top_p, seed=1, ignore_eos=True
                )
                rate, step = _rate(engine, streams, length, params)
                layout = engine.runner.cache.layout
                work = decode_work(config, layout, setup.dtype, setup.weights, streams, length + tokens // 2)
                rows.append(
                    {
                        "backend": engine.backend.name,
                        "batch_invariant": engine.backend.batch_invariant,
                        "streams": streams,
                        "temperature": temperature,
                        "top_p": top_p,
                        "tokens_per_s": rate,
                        "step_ms": 1e3 * step,
                        "share_of_floor": work.seconds(speeds(setup)) / step,
                    }
                )
            engine.close()
            del engine
            _collect(setup)
    return {"rows": rows}


def ahead(setup: Setup) -> dict[str, Any]:
    """One step ahead beside step by step: the same tokens of a mixture of requests; output tokens a second of each."""
    config, length = setup.of(PRESETS["lpa-130m"]), 8 if setup.tiny else 128
    number = 5 if setup.tiny else 64
    rng, rows = random.Random(2), list[dict[str, Any]]()
    with _folder(setup, config) as folder, _taking(setup, True):
        engine = _engine(setup, folder, number, batch_invariant=setup.place.type == "cuda" or None)
        vocab = engine.model_config.vocab_size
        prompts = [
            [rng.randrange(vocab) for _ in range(rng.randint(4, 200 if not setup.tiny else 40))] for _ in range(number)
        ]
        kinds: tuple[dict[str, Any], ...] = (
            {"temperature": 0.0},
            {"temperature": 0.9, "logprobs": 2},
            {"top_p": 0.8, "stop_token_ids": tuple(range(0, vocab, 50))},
            {"repetition_penalty": 1.2},
        )
        params = [SamplingParams(max_tokens=length, seed=i, **kinds[i % len(kinds)]) for i in range(number)]
        found = {}
        for mode in (True, False):
            engine.ahead = mode
            found[mode] = _texts(engine, prompts, params)
        stats = engine.take_stats()
        same = sum(a == b for a, b in zip(found[True], found[False], strict=True))
        told = {"steps": stats.steps, "ahead": stats.steps_ahead, "discarded_tokens": stats.discarded_tokens}
        told |= {f"held_by_{name}": count for name, count in stats.held.items()}
        engine.close()
        del engine
        for streams in (1, 3) if setup.tiny else (1, 32, 256):
            engine = _engine(setup, folder, streams)
            for temperature, mode in itertools.product((0.0, 0.8), (False, True)):
                engine.ahead = mode
                one = SamplingParams(max_tokens=length, temperature=temperature, top_p=0.9, seed=1, ignore_eos=True)
                rate, step = _rate(engine, streams, length, one)
                rows.append(
                    {
                        "streams": streams,
                        "temperature": temperature,
                        "ahead": mode,
                        "tokens_per_s": rate,
                        "step_ms": 1e3 * step,
                    }
                )
            engine.close()
            del engine
            _collect(setup)
    return {"ok": same == number, "requests": number, "same": same, **told, "rows": rows}


def http(setup: Setup) -> dict[str, Any]:
    """A server in this process, streamed completions from another one: output tokens a second, by streams."""
    config, length = setup.of(PRESETS["lpa-130m"]), 8 if setup.tiny else 128
    counts = (2,) if setup.tiny else (1, 32, 256)
    rows = []
    with _folder(setup, config) as folder:
        options = {"model": folder, "device": setup.device, "dtype": setup.weights, "max_num_seqs": max(counts)}
        with local_server(load_settings(**options, log_requests=False)) as local:
            for streams in counts:
                command = [sys.executable, "-m", "server.cli", "bench", "serve", local.url, "--json", "--rounds", "1"]
                numbers = {"concurrency": streams, "input-len": length, "output-len": length}
                for option, number in {**numbers, "vocab-size": config.vocab_size}.items():
                    command += [f"--{option}", str(number)]
                answer = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
                found = json.loads(answer)["servers"][0]["median"]
                latencies = {key: found[key]["median"] for key in ("ttft_ms", "inter_token_ms") if key in found}
                rows.append({"streams": streams, "tokens_per_s": found["output_tokens_per_s"], **latencies})
    return {"rows": rows}


def billion(setup: Setup) -> dict[str, Any]:
    """Decode steps of a random model of 1.1 billion parameters, greedy: their share of the floor."""
    config, context = setup.of(ONE_BILLION), 32 if setup.tiny else 512
    layout = config.default_cache_layout()
    rows = []
    for streams in (1, 2) if setup.tiny else (1, 64):
        backend = _backend(setup, config, layout, setup.dtype)
        step = _decode(backend, layout, streams, context, 4 if setup.tiny else 40)
        floor = decode_work(config, layout, setup.dtype, setup.weights, streams, context).seconds(speeds(setup))
        rows.append({"streams": streams, "context": context, "step_ms": 1e3 * step, "share_of_floor": floor / step})
        del backend
        _collect(setup)
    return {"parameters": config.parameter_count(), "layout": layout, "rows": rows}


def attention(setup: Setup) -> dict[str, Any]:
    """Decode attention of one layer: bytes of the cache that it reads a second, as a share of the copy bandwidth."""
    rows = []
    context, ops = 64 if setup.tiny else 8192, check.operations(setup.kernels)
    for name, layout in MEASURED:
        config = replace(setup.of(_shape(name)), num_hidden_layers=1)
        model = _random(config, setup.place, setup.dtype)
        for streams in (2,) if setup.tiny else (1, 8, 64):
            repeats = 3 if setup.tiny else 20
            seconds, read = check.attention_times(model, layout, streams, context, BLOCK_SIZE, ops, repeats)
            rows.append(
                {
                    "shape": name,
                    "layout": layout,
                    "streams": streams,
                    "context": context,
                    "ms": 1e3 * statistics.median(seconds),
                    "bytes": read,
                    "share_of_copy": read / statistics.median(seconds) / speeds(setup).bandwidth,
                }
            )
    return {"rows": rows}


def layouts(setup: Setup) -> dict[str, Any]:
    """The same model's decode steps by layout of the cache."""
    streams, context = (2, 64) if setup.tiny else (64, 1536)
    rows: list[dict[str, Any]] = []
    for name in ("lpa-370m", "lpa-130m"):
        config = setup.of(PRESETS[name])
        for layout in LAYOUTS:
            backend = _backend(setup, config, layout, setup.dtype)
            step = _decode(backend, layout, streams, context, 3 if setup.tiny else 20)
            size = bytes_per_token(config, layout, setup.dtype)
            rows.append({"model": name, "layout": layout, "step_ms": 1e3 * step, "bytes_per_token": size})
            del backend
            _collect(setup)
    full = {row["model"]: row["step_ms"] for row in rows if row["layout"] == "full"}
    for row in rows:
        row["times_as_fast_as_full"] = full[row["model"]] / row["step_ms"]
    return {"streams": streams, "context": context, "rows": rows}


def prefill(setup: Setup) -> dict[str, Any]:
    """Prompts in one step: their operations a second, as a share of the rate of a large product."""
    length = 64 if setup.tiny else 1024
    config = setup.of(PRESETS["lpa-130m"])
    layout = config.default_cache_layout()
    rows = []
    for prompts in (1, 2) if setup.tiny else (1, 8):
        backend = _backend(setup, config, layout, setup.dtype)
        blocks = -(-length // BLOCK_SIZE)
        backend.make_cache(layout, prompts * blocks, BLOCK_SIZE)
        backend.warm_up(prompts, length)
        spans = [Span(0, length, range(i * blocks, (i + 1) * blocks), False) for i in range(prompts)]
        batch = Batch.build([i % config.vocab_size for i in range(prompts * length)], spans, BLOCK_SIZE)
        last = [SamplingRow(row=(i + 1) * length - 1, temperature=0.0) for i in range(prompts)]
        found = _seconds(partial(_step, backend, batch, last), 3 if setup.tiny else 10)
        weights = sum(
            config.weight_count(name, i) for i in range(config.num_hidden_layers) for name in config.projections
        )
        pairs = config.num_hidden_layers * config.num_attention_heads * config.head_size * length * (length + 1)
        done = 2 * prompts * (length * weights + pairs)
        rows.append(
            {
                "prompts": prompts,
                "tokens": length,
                "ms": 1e3 * found,
                "tokens_per_s": prompts * length / found,
                "share_of_gemm": done / found / speeds(setup).gemm,
            }
        )
    return {"rows": rows}


def start(setup: Setup) -> dict[str, Any]:
    """Seconds from a model folder to an engine that can step, and the device's memory beyond weights and cache."""
    config = setup.of(PRESETS["lpa-130m"])
    with _folder(setup, config) as folder:
        before = _used(setup)
        began = time.monotonic()
        engine = _engine(setup, folder, 4 if setup.tiny else 256)
        engine.warm_up()
        seconds = time.monotonic() - began
        _texts(engine, [[1, 2, 3]], [SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)])
        used = _used(setup) - before if setup.place.type == "cuda" else None
        pools = sum(pool.nbytes for pool in engine.runner.cache.pools)
        weights = config.parameter_count() * setup.dtype.itemsize
    beyond = None if used is None else used - pools - weights
    return {"seconds": seconds, "bytes_beyond": beyond, "cache_bytes": pools, "weight_bytes": weights}


def transformers_generate(setup: Setup) -> dict[str, Any]:
    """transformers' generate on the exported model, with a static cache, compiled on a GPU: output tokens a second."""
    from lpa_model.convert.export import export_llama

    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        return {"left_out": "transformers is not installed"}
    config, length = setup.of(PRESETS["lpa-130m"]), 8 if setup.tiny else 128
    rows = []
    with _folder(setup, config) as folder:
        out = folder.parent / "exported"
        export_llama(folder, out, setup.dtype)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=setup.dtype).to(setup.place)
        for streams in (1,) if setup.tiny else (1, 32):
            ids = torch.randint(0, config.vocab_size, (streams, length), device=setup.place)
            keys: dict[str, Any] = {"cache_implementation": "static", "do_sample": False, "min_new_tokens": length}
            seconds = []
            for _ in range(2 if setup.tiny else 3):  # the first one compiles
                began = time.perf_counter()
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, **keys)
                if setup.place.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            rows.append(
                {"streams": streams, "tokens_per_s": streams * length / min(seconds[1:]), "first_s": seconds[0]}
            )
    return {"rows": rows}


PARTS: dict[str, Part] = {
    "environment": Part(environment, 60),
    "operations": Part(operations, 120),
    "contract": Part(contract, 90),
    "invariance": Part(invariance, 60),
    "start": Part(start, 60),
    "steps": Part(steps, 150),
    "ahead": Part(ahead, 90),
    "http": Part(http, 90),
    "attention": Part(attention, 60),
    "billion": Part(billion, 60),
    "layouts": Part(layouts, 60),
    "prefill": Part(prefill, 45),
    "seeded": Part(seeded, 60),
    "transformers": Part(transformers_generate, 90),
}
"""In the order in which they run."""


def bench_device(
    setup: Setup,
    names: Sequence[str],
    minutes: float,
    out: Path | None,
    on_part: Callable[[str, dict[str, Any]], None] = lambda name, found: None,
) -> dict[str, dict[str, Any]]:
    """Run the parts in their order; what each found, or why it found nothing (`error` or `left_out`).

    Args:
        setup: device and sizes.
        names: of PARTS.
        minutes: for all of them together.
        out: where the report is written, after each part.
        on_part: told of each as it is done.
    """
    until = time.monotonic() + 60 * minutes
    report: dict[str, dict[str, Any]] = {}
    worker = _Worker(setup)
    try:
        for name, part in PARTS.items():
            left = until - time.monotonic()
            if name not in names:
                report[name] = {"left_out": "it was not named"}
            elif left < LEAST_SECONDS:
                report[name] = {"left_out": f"the {minutes:g} minutes were used up"}
            else:
                began = time.monotonic()
                report[name] = worker.run(name, left if setup.tiny else min(part.limit, left))
                report[name]["seconds_taken"] = time.monotonic() - began
            if out is not None:
                out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            if name in names:
                on_part(name, report[name])
    finally:
        worker.end()
    return report


class _Worker:
    """A process that runs parts, and a new one after a failure."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def run(self, name: str, seconds: float) -> dict[str, Any]:
        if self._process is None:
            context = get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, self._setup))
            self._process.start()
            theirs.close()
        assert self._pipe is not None
        try:
            self._pipe.send(name)
            if self._pipe.poll(seconds):
                found: dict[str, Any] = self._pipe.recv()
            else:
                found = {"error": f"it took longer than {seconds:.0f} seconds"}
        except (EOFError, OSError):
            self._process.join(5)
            found = {"error": f"its process ended with {self._process.exitcode}"}
        if "error" in found:
            self.end()
        return found

    def end(self) -> None:
        if self._process is not None and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # what it has started, too
            self._process.kill()  # before it has a group
            self._process.join()
        self._process = None


def _work(pipe: Connection, setup: Setup) -> None:
    """The process: names of parts in, what they found out."""
    os.setpgid(0, 0)
    if setup.tiny and setup.place.type == "cpu":
        torch.set_num_threads(1)  # products this small lose by more
    os.environ["LPA_CUDA"] = "1" if setup.place.type == "cuda" else "twins"
    torch.set_grad_enabled(False)
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        try:
            # in a thread of its own, as the engine's is
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(_run, PARTS[name].run, setup).result()
        except Exception:
            found = {"error": traceback.format_exc(limit=-6)}
        _collect(setup)
        pipe.send(found)


@torch.no_grad()
def _run(part: Callable[[Setup], dict[str, Any]], setup: Setup) -> dict[str, Any]:
    return part(setup)


def _cases(setup: Setup) -> Iterator[tuple[str, CacheLayout, torch.dtype]]:
    names = ("setting 1", "grouped heads, biases") if setup.tiny else tuple(CHECKED)
    for name, layout, dtype in itertools.product(names, LAYOUTS, (torch.float32, torch.bfloat16)):
        if layout == "latent" and CHECKED[name].qk_norm:
            continue  # keys that are normalised have no latents
        if setup.tiny and dtype is torch.bfloat16 and (layout != "mixed" or setup.interpreted):
            continue
        yield name, layout, dtype


def _shape(name: str) -> LPAConfig:
    return ONE_BILLION if name == "1.1b" else PRESETS[name]


def _random(config: LPAConfig, device: torch.device, dtype: torch.dtype) -> LPAForCausalLM:
    """The same weights on every device where they are checked; large ones are made where they are used."""
    if config.parameter_count() < 50_000_000:
        model = LPAForCausalLM(config)
        initialize(model, 0)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        model = model.to(dtype).to(device)
    else:
        with device:
            model = LPAForCausalLM(config).to(dtype)
    if model.rotary is not None:
        model.rotary.build(config, device)
    return model.eval().requires_grad_(False)


def _backend(
    setup: Setup, config: LPAConfig, layout: CacheLayout, dtype: torch.dtype, invariant: bool = False
) -> Backend:
    """This backend over a random model, whatever else the machine would take."""
    held: WeightType = "float32" if dtype is torch.float32 else "bfloat16"
    case = select.Case(config, dtype, setup.place, layout, BLOCK_SIZE, (), held, dtype, invariant)
    with _taking(setup, True):
        if reason := select.CUDA.refuses(case):
            raise ValueError(f"the CUDA backend: {reason}")
        return select.CUDA.build(case, _random(config, setup.place, dtype))


@contextlib.contextmanager
def _taking(setup: Setup, kernels: bool) -> Iterator[None]:
    """Take this backend on the device, with its twins on a CPU, or what would be taken without it."""
    before = os.environ.get("LPA_CUDA")
    os.environ["LPA_CUDA"] = "0" if not kernels else "1" if setup.place.type == "cuda" else "twins"
    try:
        yield
    finally:
        del os.environ["LPA_CUDA"]
        if before is not None:
            os.environ["LPA_CUDA"] = before


def _through(
    backend: Backend, layout: CacheLayout, texts: Sequence[list[int]], prompts: Sequence[int], chunk: int | None = None
) -> Tensor:
    """Log-probabilities [tokens of all texts, vocab] after each token: so many tokens of each text are its prompt,
    taken `chunk` at a time, the others count as generated; all texts go on together."""
    blocks, vocab = max(-(-len(ids) // BLOCK_SIZE) for ids in texts), backend.config.vocab_size
    backend.make_cache(layout, blocks * len(texts), BLOCK_SIZE)
    backend.warm_up(len(texts), backend.config.max_position_embeddings)
    done, rows = [0] * len(texts), [list[Tensor]() for _ in texts]
    while any(n < len(ids) for n, ids in zip(done, texts, strict=True)):
        active = [i for i, ids in enumerate(texts) if done[i] < len(ids)]
        active.sort(key=lambda i: done[i] < prompts[i])  # generated tokens first
        spans = []
        for i in active:
            left = prompts[i] - done[i]
            length = min(left, chunk or left) if left > 0 else 1
            spans.append(Span(done[i], length, range(i * blocks, (i + 1) * blocks), left <= 0))
        ids = [token for i, span in zip(active, spans, strict=True) for token in texts[i][done[i] :][: span.length]]
        every = np.arange(len(ids))
        batch = Batch.build(ids, spans, BLOCK_SIZE, scored=ScoredRows(every, every * 0, every * 0 + vocab))
        scores = backend.collect(backend.submit(batch, []), {}).prompt_scores
        found = torch.empty(len(ids), vocab)
        found.scatter_(1, torch.tensor(scores.top_ids), torch.tensor(scores.top_logprobs))
        for i, span, part in zip(active, spans, found.split([span.length for span in spans]), strict=True):
            rows[i].append(part)
            done[i] += span.length
    return torch.cat([torch.cat(parts) for parts in rows])


def _decode(backend: Backend, layout: CacheLayout, streams: int, context: int, number: int) -> float:
    """Median seconds of greedy decode steps of so many sequences after `context` tokens, whose cache is zeros."""
    longest = context + number + 4
    blocks = -(-longest // BLOCK_SIZE)
    backend.make_cache(layout, streams * blocks, BLOCK_SIZE)
    backend.warm_up(streams, longest)
    rows = [SamplingRow(row=i, temperature=0.0) for i in range(streams)]
    position = itertools.count(context)

    def step() -> None:
        at = next(position)
        spans = [Span(at, 1, range(i * blocks, (i + 1) * blocks), True) for i in range(streams)]
        backend.collect(backend.submit(Batch.build([1] * streams, spans, BLOCK_SIZE), rows), {})

    return _seconds(step, number)


def _step(backend: Backend, batch: Batch, rows: Sequence[SamplingRow]) -> None:
    backend.collect(backend.submit(batch, rows), {})


def _seconds(run: Callable[[], object], number: int) -> float:
    """Median of so many runs, after three that do not count."""
    found = []
    for _ in range(number + 3):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found[3:])


@contextlib.contextmanager
def _folder(setup: Setup, config: LPAConfig) -> Iterator[Path]:
    """A model folder with random weights, gone afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        init_model(config, folder, 0, setup.dtype)
        yield folder


def _engine(setup: Setup, folder: Path, streams: int, batch_invariant: bool | None = None) -> Engine:
    options = {
        "device": setup.device,
        "dtype": setup.weights,
        "max_num_seqs": streams,
        "batch_invariant": batch_invariant,
    }
    return build_engine(folder, load_settings(**options).engine_options())


def _texts(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
    """The tokens that follow each prompt, all of them at once."""
    requests = [Request(f"r{i}", list(ids), one) for i, (ids, one) in enumerate(zip(prompts, params, strict=True))]
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        engine.step()
    return [request.token_ids[request.num_prompt_tokens :] for request in requests]


def _rate(engine: Engine, streams: int, length: int, params: SamplingParams) -> tuple[float, float]:
    """Output tokens a second of prompts of `length` tokens, from the first to the last; median seconds of a step that
    has generated tokens of all of them alone."""
    rng, vocab = random.Random(f"{streams}:{params}"), engine.model_config.vocab_size

    def prompts() -> list[list[int]]:
        return [[rng.randrange(vocab) for _ in range(length)] for _ in range(streams)]

    _texts(engine, prompts(), [replace(params, max_tokens=3)] * streams)  # compiles what prompts need
    for i, ids in enumerate(prompts()):
        engine.add_request(Request(f"r{i}", ids, params))
    found, began = list[float](), time.perf_counter()
    while engine.has_work:
        started = time.perf_counter()
        outputs = engine.step()
        if len(outputs) == streams:
            found.append(time.perf_counter() - started)
    total = time.perf_counter() - began
    return streams * params.max_tokens / total, statistics.median(found)


def _used(setup: Setup) -> int:
    """Bytes of the device's memory in use, up to a constant."""
    _collect(setup)
    return -features.free_memory(setup.place)


def _collect(setup: Setup) -> None:
    """Memory without an owner is given back to the device."""
    gc.collect()
    if setup.place.type == "cuda":
        torch.cuda.empty_cache()


def print_part(name: str, found: dict[str, Any]) -> None:
    """One line for a part, and one for each row that it measured."""
    what = found.get("error") or found.get("left_out")
    state = (
        "failed"
        if "error" in found
        else "left out"
        if "left_out" in found
        else "ok"
        if found.get("ok", True)
        else "WRONG"
    )
    taken = f", {found['seconds_taken']:.1f} s" if "seconds_taken" in found else ""
    print(f"{name}: {state}{taken}{f': {what.strip().splitlines()[-1]}' if what else ''}", flush=True)
    rest = {
        key: value for key, value in found.items() if key not in ("rows", "error", "left_out", "ok", "seconds_taken")
    }
    for row in [*([rest] if rest else []), *found.get("rows", [])]:
        print("   " + ", ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{max(value.values()):.2g} ({max(value, key=value.__getitem__)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
