"""Static buffers of the CUDA backend, and which models its kernels cannot compute; the contract is in test_backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lpa_model.backends.cuda.backend import CudaBackend
from lpa_model.backends.cuda.limits import unsupported
from lpa_model.backends.cuda.twins import TWINS
from lpa_model.batch import Span
from lpa_model.config import CacheLayout
from tests.test_backends import BLOCK_SIZE, all_logprobs
from tests.tiny import random_model, tiny_config


@pytest.mark.parametrize("layout", ["latent", "full"])
def test_padding_rows_write_nothing(layout: CacheLayout) -> None:
    backend = CudaBackend(random_model(tiny_config("setting1")), "twins", TWINS, False)
    cache = backend.make_cache(layout, 4, BLOCK_SIZE)
    backend.warm_up(8, 64)
    all_logprobs(backend, [5, 6, 7, 5], [Span(0, 3, [1], False), Span(0, 1, [2], False)])
    before = [pool.clone() for pool in cache.pools]
    all_logprobs(backend, [8, 9, 3], [Span(3, 1, [1], True), Span(1, 1, [2], True), Span(0, 1, [0], True)])
    for pool, old in zip(cache.pools, before, strict=True):  # three rows in a graph for four
        changed = (pool != old).any(-1).any(1).nonzero()
        assert changed.tolist() == [[0, 0], [1, 3], [2, 1]]


@pytest.mark.parametrize(
    ("changes", "layout", "reason"),
    [
        ({}, "latent", None),
        ({"head_dim": 256}, "full", None),
        ({"head_dim": 258}, "full", "heads of up to 256"),
        ({"hidden_size": 16388, "head_dim": 8}, "full", "hidden_size of up to 16384"),
        ({"num_attention_heads": 129, "num_key_value_heads": 1, "head_dim": 8}, "full", "up to 128 query heads"),
        ({"attention_rank": 1040, "hidden_size": 1040, "head_dim": 8}, "mixed", "v of layer 0 has rank 1040"),
        ({"attention_rank": 1040, "hidden_size": 1040, "head_dim": 8}, "full", None),
    ],
)
def test_limits(changes: dict[str, Any], layout: CacheLayout, reason: str | None) -> None:
    found = unsupported(tiny_config(**changes), layout)
    assert found is None if reason is None else found is not None and reason in found


def test_ranks_and_heads_of_any_size_are_padded() -> None:
    model = random_model(tiny_config("setting2", head_dim=6, attention_rank=5, ffn_rank=7, intermediate_size=50))
    backend = CudaBackend(model, "twins", TWINS, False)
    cache = backend.make_cache("mixed", 2, BLOCK_SIZE)
    assert {pool.shape[3] for pool in cache.pools} == {16}
    ids = [3, 4, 5, 6]
    found = all_logprobs(backend, ids, [Span(0, 4, [1], False)])
    expected = model.logits(model(torch.tensor([ids]))[0]).log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
