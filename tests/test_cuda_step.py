"""Steps of the GPU backend in plain torch: static buffers, padded widths, any mixture, against the plain forward."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lpa_model.backends.base import SamplingRow
from lpa_model.backends.cuda.limits import unsupported
from lpa_model.backends.cuda.ops import Ops
from lpa_model.backends.cuda.rows import StepBuffers, step_rows
from lpa_model.backends.cuda.step import decode_step, head, mixed_step
from lpa_model.backends.cuda.twins import TWINS
from lpa_model.backends.cuda.weights import UNIT, Weights
from lpa_model.backends.torch.backend import TorchBackend
from lpa_model.backends.torch.results import ComputedStep
from lpa_model.batch import Batch, Span
from lpa_model.cache import LatentCache
from lpa_model.config import CacheLayout
from tests.conftest import VOCAB_SIZE, random_model, tiny_config
from tests.test_backends import (
    BLOCK_SIZE,
    CASES,
    LAYOUTS,
    MAX_POSITIONS,
    Subject,
    _branched,
    all_logprobs,
    check,
    exact_twin,
    expected_of,
    loaded,
    plain_logprobs,
    random_texts,
    run,
)

CAPACITY = 4


class Steps(TorchBackend):
    """The steps as a backend: decode rows alone through static buffers that have padding, others as they are."""

    ops: Ops = TWINS

    def make_cache(self, layout: CacheLayout, num_blocks: int, block_size: int) -> LatentCache:
        self.cache = LatentCache(self.config, layout, num_blocks, block_size, self.dtype, width_unit=UNIT)
        self.weights = Weights(self.model, self.cache.forms)
        self.buffers = StepBuffers(CAPACITY, -(-MAX_POSITIONS // block_size), self.device)
        return self.cache

    @torch.inference_mode()
    def submit(self, batch: Batch, sampling: Sequence[SamplingRow]) -> ComputedStep:
        assert self.cache is not None  # blocks are not cleared: what lies behind a sequence must not matter
        inner: dict[int, Tensor] = {}

        def keep(layer: int, stream: Tensor) -> None:
            if (rows := batch.hidden.get(layer)) is not None:
                inner[layer] = stream[torch.from_numpy(rows)].clone()

        if batch.num_rows == batch.num_decode and not batch.hidden:
            self.buffers.fill(batch)
            return ComputedStep(batch, sampling, decode_step(self.weights, self.cache, self.buffers, self.ops), {})
        hidden = mixed_step(self.weights, self.cache, step_rows(batch, self.device), self.ops, keep)
        return ComputedStep(batch, sampling, hidden, inner)

    def head(self, hidden: Tensor) -> Tensor:
        return head(self.weights, hidden.to(self.dtype), self.ops)


def steps(case: str, dtype: torch.dtype) -> Steps:
    return Steps(loaded(case, subject(dtype)), "steps", dtype)


def subject(dtype: torch.dtype) -> Subject:
    return Subject(dtype, "torch", "float32" if dtype is torch.float32 else "bfloat16", dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_every_row_equals_the_plain_forward(case: str, layout: CacheLayout) -> None:
    for dtype in (torch.float32, torch.bfloat16) if case.endswith("-wide") else (torch.float32,):
        tested = subject(dtype)
        backend = steps(case, dtype)
        texts = random_texts(random.Random(len(case)), 4)
        run(backend, layout, texts, seed=len(case))
        found = torch.cat([torch.cat(text.rows) for text in texts])
        expected = expected_of(exact_twin(loaded(case, tested)), texts)
        check(found, expected, partial(expected_of, loaded(case, tested), texts), tested)


@pytest.mark.parametrize("case", ["setting1", "setting2", "setting2-wide"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_branches_see_the_beginning_and_themselves(case: str, layout: CacheLayout) -> None:
    model = exact_twin(loaded(case, subject(torch.float32)))
    ids = [(7 * i * i + 3) % VOCAB_SIZE for i in range(70)]
    parts = []
    for start, end in ((0, 45), (45, 58), (58, 70)):
        rows = plain_logprobs(model, ids[:40] + ids[max(start, 40) : end])
        parts.append(rows if start == 0 else rows[40:])
    for chunk in (70, 9):
        found = _branched(steps(case, torch.float32), layout, chunk)
        torch.testing.assert_close(found, torch.cat(parts), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_what_layers_read() -> None:
    model = random_model(tiny_config("setting2"))
    backend = Steps(model, "steps", torch.float32)
    backend.make_cache("mixed", 4, BLOCK_SIZE)
    ids = list(range(10, 20))
    expected: list[Tensor] = []
    model(torch.tensor([ids]), on_layer=lambda layer, x: expected.append(x[0].clone()))
    rows = torch.tensor([0, 7, 9]).numpy()
    for span_decode, start in ((False, 0), (True, 9)):
        wanted = rows if start == 0 else rows[:1]
        batch = Batch.build(
            ids[start:], [Span(start, 10 - start, [1], span_decode)], BLOCK_SIZE, hidden={0: wanted, 1: wanted}
        )
        inner = backend.submit(batch, []).inner
        for layer in (0, 1):
            torch.testing.assert_close(inner[layer], expected[layer][start:][wanted], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_padding_rows_write_nothing() -> None:
    backend = steps("setting1", torch.float32)
    cache = backend.make_cache("latent", 3, BLOCK_SIZE)
    all_logprobs(backend, [5, 6, 7], [Span(0, 3, [1], False)])
    before = [pool.clone() for pool in cache.pools]
    all_logprobs(backend, [8], [Span(3, 1, [1], True)])
    for pool, old in zip(cache.pools, before, strict=True):
        changed = (pool != old).any(-1).nonzero()
        assert changed.tolist() == [[1, 0, 3]]


@pytest.mark.parametrize(
    ("changes", "layout", "reason"),
    [
        ({}, "latent", None),
        ({"head_dim": 256}, "full", None),
        ({"head_dim": 258}, "full", "heads of up to 256"),
        ({"hidden_size": 16388}, "full", "hidden_size of up to 16384"),
        ({"num_attention_heads": 129, "num_key_value_heads": 1, "head_dim": 8}, "full", "up to 128 query heads"),
        ({"attention_rank": 1040, "hidden_size": 1040}, "mixed", "v of layer 0 has rank 1040"),
        ({"attention_rank": 1040, "hidden_size": 1040}, "full", None),
    ],
)
def test_limits(changes: dict[str, Any], layout: CacheLayout, reason: str | None) -> None:
    found = unsupported(tiny_config(**changes), layout)
    assert found is None if reason is None else found is not None and reason in found
