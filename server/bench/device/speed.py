"""The parts that say how fast a GPU is."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lpa_model.backends.base import SamplingRow
from lpa_model.backends.cuda import check
from lpa_model.batch import Batch, Span
from lpa_model.cache import bytes_per_token
from lpa_model.config import PRESETS
from server.bench.device.backend_runs import (
    decode_seconds,
    make_backend,
    median_seconds,
    one_step,
    random_model,
    taking,
)
from server.bench.device.engine_runs import (
    generated,
    give_back_memory,
    make_engine,
    model_folder,
    token_rate,
    used_memory,
)
from server.bench.device.setup import BLOCK_SIZE, LAYOUTS, MEASURED, ONE_BILLION, Setup, shape, speeds
from server.bench.floor import decode_work
from server.bench.local import local_server
from server.engine.request import SamplingParams
from server.settings import load_settings


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


def start(setup: Setup) -> dict[str, Any]:
    """Seconds from a model folder to an engine that can step, and the device's memory beyond weights and cache."""
    config = setup.of(PRESETS["lpa-130m"])
    with model_folder(setup, config) as folder:
        before = used_memory(setup)
        began = time.monotonic()
        engine = make_engine(setup, folder, 4 if setup.tiny else 256)
        engine.warm_up()
        seconds = time.monotonic() - began
        generated(engine, [[1, 2, 3]], [SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)])
        used = used_memory(setup) - before if setup.place.type == "cuda" else None
        pools = sum(pool.nbytes for pool in engine.runner.cache.pools)
        weights = config.parameter_count() * setup.dtype.itemsize
    beyond = None if used is None else used - pools - weights
    return {"seconds": seconds, "bytes_beyond": beyond, "cache_bytes": pools, "weight_bytes": weights}


def steps(setup: Setup) -> dict[str, Any]:
    """The engine with its scheduling and sampling, without HTTP: output tokens a second, by streams, of this backend
    and of torch's operators."""
    config = setup.of(PRESETS["lpa-130m"])
    length = 8 if setup.tiny else 128
    rows: list[dict[str, Any]] = []
    kinds = [(True, None), (False, None)] + ([(True, True)] if setup.place.type == "cuda" else [])
    with model_folder(setup, config) as folder:
        for (kernels, invariant), streams in itertools.product(kinds, (1, 3) if setup.tiny else (1, 32, 256)):
            with taking(setup, kernels):
                engine = make_engine(setup, folder, streams, invariant)
            tokens = length if kernels else min(length, 32)  # torch's operators are slow on a GPU
            for temperature, top_p in ((0.0, 1.0), (0.8, 0.9)):
                params = SamplingParams(
                    max_tokens=tokens, temperature=temperature, top_p=top_p, seed=1, ignore_eos=True
                )
                rate, step = token_rate(engine, streams, length, params)
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
            give_back_memory(setup)
    return {"rows": rows}


def ahead(setup: Setup) -> dict[str, Any]:
    """One step ahead beside step by step: the same tokens of a mixture of requests; output tokens a second of each."""
    config, length = setup.of(PRESETS["lpa-130m"]), 8 if setup.tiny else 128
    number = 5 if setup.tiny else 64
    rng, rows = random.Random(2), list[dict[str, Any]]()
    with model_folder(setup, config) as folder, taking(setup, True):
        engine = make_engine(setup, folder, number, batch_invariant=setup.place.type == "cuda" or None)
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
            found[mode] = generated(engine, prompts, params)
        stats = engine.take_stats()
        same = sum(a == b for a, b in zip(found[True], found[False], strict=True))
        told = {"steps": stats.steps, "ahead": stats.steps_ahead, "discarded_tokens": stats.discarded_tokens}
        told |= {f"held_by_{name}": count for name, count in stats.held.items()}
        engine.close()
        del engine
        for streams in (1, 3) if setup.tiny else (1, 32, 256):
            engine = make_engine(setup, folder, streams)
            for temperature, mode in itertools.product((0.0, 0.8), (False, True)):
                engine.ahead = mode
                one = SamplingParams(max_tokens=length, temperature=temperature, top_p=0.9, seed=1, ignore_eos=True)
                rate, step = token_rate(engine, streams, length, one)
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
            give_back_memory(setup)
    return {"ok": same == number, "requests": number, "same": same, **told, "rows": rows}


def http(setup: Setup) -> dict[str, Any]:
    """A server in this process, streamed completions from another one: output tokens a second, by streams."""
    config, length = setup.of(PRESETS["lpa-130m"]), 8 if setup.tiny else 128
    counts = (2,) if setup.tiny else (1, 32, 256)
    rows = []
    with model_folder(setup, config) as folder:
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


def attention(setup: Setup) -> dict[str, Any]:
    """Decode attention of one layer: bytes of the cache that it reads a second, as a share of the copy bandwidth."""
    rows = []
    context, ops = 64 if setup.tiny else 8192, check.operations(setup.kernels)
    for name, layout in MEASURED:
        config = replace(setup.of(shape(name)), num_hidden_layers=1)
        model = random_model(config, setup.place, setup.dtype)
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


def billion(setup: Setup) -> dict[str, Any]:
    """Decode steps of a random model of 1.1 billion parameters, greedy: their share of the floor."""
    config, context = setup.of(ONE_BILLION), 32 if setup.tiny else 512
    layout = config.default_cache_layout()
    rows = []
    for streams in (1, 2) if setup.tiny else (1, 64):
        backend = make_backend(setup, config, layout, setup.dtype)
        step = decode_seconds(backend, layout, streams, context, 4 if setup.tiny else 40)
        floor = decode_work(config, layout, setup.dtype, setup.weights, streams, context).seconds(speeds(setup))
        rows.append({"streams": streams, "context": context, "step_ms": 1e3 * step, "share_of_floor": floor / step})
        del backend
        give_back_memory(setup)
    return {"parameters": config.parameter_count(), "layout": layout, "rows": rows}


def layouts(setup: Setup) -> dict[str, Any]:
    """The same model's decode steps by layout of the cache."""
    streams, context = (2, 64) if setup.tiny else (64, 1536)
    rows: list[dict[str, Any]] = []
    for name in ("lpa-370m", "lpa-130m"):
        config = setup.of(PRESETS[name])
        for layout in LAYOUTS:
            backend = make_backend(setup, config, layout, setup.dtype)
            step = decode_seconds(backend, layout, streams, context, 3 if setup.tiny else 20)
            size = bytes_per_token(config, layout, setup.dtype)
            rows.append({"model": name, "layout": layout, "step_ms": 1e3 * step, "bytes_per_token": size})
            del backend
            give_back_memory(setup)
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
        backend = make_backend(setup, config, layout, setup.dtype)
        blocks = -(-length // BLOCK_SIZE)
        backend.make_cache(layout, prompts * blocks, BLOCK_SIZE)
        backend.warm_up(prompts, length)
        spans = [Span(0, length, range(i * blocks, (i + 1) * blocks), False) for i in range(prompts)]
        batch = Batch.build([i % config.vocab_size for i in range(prompts * length)], spans, BLOCK_SIZE)
        last = [SamplingRow(row=(i + 1) * length - 1, temperature=0.0) for i in range(prompts)]
        found = median_seconds(partial(one_step, backend, batch, last), 3 if setup.tiny else 10)
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


def transformers_generate(setup: Setup) -> dict[str, Any]:
    """transformers' generate on the exported model, with a static cache, compiled on a GPU: output tokens a second."""
    from lpa_model.convert.export import export_llama

    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        return {"left_out": "transformers is not installed"}
    config, length = setup.of(PRESETS["lpa-130m"]), 8 if setup.tiny else 128
    rows = []
    with model_folder(setup, config) as folder:
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
