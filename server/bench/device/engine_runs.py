"""Requests through an engine over a random model."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lpa_model.backends import features
from lpa_model.config import LPAConfig
from lpa_model.init import init_model
from server.bench.device.setup import Setup
from server.engine.engine import Engine, build_engine
from server.engine.request import Request, SamplingParams
from server.settings import load_settings


@contextlib.contextmanager
def model_folder(setup: Setup, config: LPAConfig) -> Iterator[Path]:
    """A model folder with random weights, gone afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        init_model(config, folder, 0, setup.dtype)
        yield folder


def make_engine(setup: Setup, folder: Path, streams: int, batch_invariant: bool | None = None) -> Engine:
    options = {
        "device": setup.device,
        "dtype": setup.weights,
        "max_num_seqs": streams,
        "batch_invariant": batch_invariant,
    }
    return build_engine(folder, load_settings(**options).engine_options())


def generated(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
    """The tokens that follow each prompt, all of them at once."""
    requests = [Request(f"r{i}", list(ids), one) for i, (ids, one) in enumerate(zip(prompts, params, strict=True))]
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        engine.step()
    return [request.token_ids[request.num_prompt_tokens :] for request in requests]


def token_rate(engine: Engine, streams: int, length: int, params: SamplingParams) -> tuple[float, float]:
    """Output tokens a second of prompts of `length` tokens, from the first to the last; median seconds of a step that
    has generated tokens of all of them alone."""
    rng, vocab = random.Random(f"{streams}:{params}"), engine.model_config.vocab_size

    def prompts() -> list[list[int]]:
        return [[rng.randrange(vocab) for _ in range(length)] for _ in range(streams)]

    generated(engine, prompts(), [replace(params, max_tokens=3)] * streams)  # compiles what prompts need
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


def used_memory(setup: Setup) -> int:
    """Bytes of the device's memory in use, up to a constant."""
    give_back_memory(setup)
    return -features.free_memory(setup.place)


def give_back_memory(setup: Setup) -> None:
    """Memory without an owner is given back to the device."""
    gc.collect()
    if setup.place.type == "cuda":
        torch.cuda.empty_cache()
