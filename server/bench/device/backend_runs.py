"""Texts and decode steps through the backend alone, without an engine."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lpa_model.backends import select
from lpa_model.backends.base import Backend, SamplingRow
from lpa_model.batch import Batch, ScoredRows, Span
from lpa_model.config import CacheLayout, LPAConfig
from lpa_model.init import initialize
from lpa_model.model import LPAForCausalLM
from lpa_model.quantization import WeightType
from server.bench.device.setup import BLOCK_SIZE, Setup


def random_model(config: LPAConfig, device: torch.device, dtype: torch.dtype) -> LPAForCausalLM:
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


def make_backend(
    setup: Setup, config: LPAConfig, layout: CacheLayout, dtype: torch.dtype, invariant: bool = False
) -> Backend:
    """This backend over a random model, whatever else the machine would take."""
    held: WeightType = "float32" if dtype is torch.float32 else "bfloat16"
    case = select.Case(config, dtype, setup.place, layout, BLOCK_SIZE, (), held, dtype, invariant)
    with taking(setup, True):
        if reason := select.CUDA.refuses(case):
            raise ValueError(f"the CUDA backend: {reason}")
        return select.CUDA.build(case, random_model(config, setup.place, dtype))


@contextlib.contextmanager
def taking(setup: Setup, kernels: bool) -> Iterator[None]:
    """Take this backend on the device, with its twins on a CPU, or what would be taken without it."""
    before = os.environ.get("LPA_CUDA")
    os.environ["LPA_CUDA"] = "0" if not kernels else "1" if setup.place.type == "cuda" else "twins"
    try:
        yield
    finally:
        del os.environ["LPA_CUDA"]
        if before is not None:
            os.environ["LPA_CUDA"] = before


def through(
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


def decode_seconds(backend: Backend, layout: CacheLayout, streams: int, context: int, number: int) -> float:
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
        one_step(backend, Batch.build([1] * streams, spans, BLOCK_SIZE), rows)

    return median_seconds(step, number)


def one_step(backend: Backend, batch: Batch, rows: Sequence[SamplingRow]) -> None:
    backend.collect(backend.submit(batch, rows), {})


def median_seconds(run: Callable[[], object], number: int) -> float:
    """Median of so many runs, after three that do not count."""
    found = []
    for _ in range(number + 3):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found[3:])
