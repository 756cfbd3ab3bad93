"""The block pools: what is written at slots is found through block tables."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from lpa_model.cache import LatentCache
from lpa_model.config import Architecture, CacheLayout
from tests.conftest import tiny_config

CPU = torch.device("cpu")


def test_shapes_of_the_pools(architecture: Architecture) -> None:
    """[blocks, heads, block_size, width]: one head of rank 8, or two key-value heads of 10."""
    config = tiny_config(architecture, head_dim=10, num_key_value_heads=2)
    latent, full = (5, 1, 4, 8), (5, 2, 4, 10)
    expected: dict[CacheLayout, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "latent": (latent, latent),
        "mixed": (full, latent),
        "full": (full, full),
    }
    for layout, (keys, values) in expected.items():
        cache = LatentCache(config, layout, 5, 4, torch.zeros)
        assert [tuple(pool.shape) for pool in cache.keys] == [keys] * 2
        assert [tuple(pool.shape) for pool in cache.values] == [values] * 2


@pytest.mark.parametrize("layout", get_args(CacheLayout))
def test_dense_projections_are_cached_in_full(layout: CacheLayout) -> None:
    config = tiny_config(attention_rank={"q": 8, "k": [None, 6], "v": [5, None], "o": 8})
    cache = LatentCache(config, layout, 1, 1, torch.zeros)
    latent_key, latent_value = layout == "latent", layout in ("latent", "mixed")
    assert cache.forms == [(False, latent_value), (latent_key, False)]
    assert [pool.shape[1] * pool.shape[3] for pool in cache.keys] == [32, 6 if latent_key else 32]
    assert [pool.shape[1] * pool.shape[3] for pool in cache.values] == [5 if latent_value else 32, 32]


@pytest.mark.parametrize("layout", get_args(CacheLayout))
def test_tokens_come_back_in_order_through_a_shuffled_table(layout: CacheLayout) -> None:
    cache = LatentCache(tiny_config(num_key_value_heads=2), layout, 6, 4, torch.zeros)
    table, length = torch.tensor([4, 0, 5]), 10
    positions = torch.arange(length)
    _, heads, _, width = cache.keys[1].shape
    _, value_heads, _, value_width = cache.values[1].shape
    keys, values = torch.randn(length, heads, width), torch.randn(length, value_heads, value_width)
    cache.write(1, (table[positions // 4], positions % 4), keys, values)
    assert torch.equal(cache.gather(cache.keys[1], table[None], length), keys[None])
    assert torch.equal(cache.gather(cache.values[1], table[None], 7), values[None, :7])
    assert torch.equal(cache.keys[1][5, :, 1], keys[9])
    assert not cache.keys[1][5, :, 2:].any() and not cache.keys[1][1:4].any() and not cache.keys[0].any()


def test_zero_clears_the_blocks_named_in_every_layer_and_no_other() -> None:
    cache = LatentCache(tiny_config(), "mixed", 4, 2, torch.zeros)
    pools = (*cache.keys, *cache.values)
    for pool in pools:
        pool.fill_(float("nan"))
    cache.zero(torch.tensor([1, 3]))
    for pool in pools:
        assert not pool[[1, 3]].any()
        assert pool[[0, 2]].isnan().all()


@pytest.mark.parametrize("layout", get_args(CacheLayout))
def test_copies_of_blocks_in_every_layer(layout: CacheLayout) -> None:
    cache = LatentCache(tiny_config(), layout, 5, 2, torch.zeros)
    pools = (*cache.keys, *cache.values)
    for pool in pools:
        pool.normal_()
    before = [pool.clone() for pool in pools]
    cache.copy(torch.tensor([1, 1, 4]), torch.tensor([0, 3, 2]))
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool, old[[1, 1, 4, 1, 4]])
