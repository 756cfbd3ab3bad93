"""The block pools: what is written at slots is found through block tables."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lpa_model.cache import LatentCache, dequantize_rows, quantize_rows
from lpa_model.config import Architecture, CacheLayout
from tests.tiny import tiny_config

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
        cache = LatentCache(config, layout, 5, 4, torch.float32)
        assert [tuple(pool.shape) for pool in cache.keys] == [keys] * 2
        assert [tuple(pool.shape) for pool in cache.values] == [values] * 2


@pytest.mark.parametrize("layout", get_args(CacheLayout))
def test_dense_projections_are_cached_in_full(layout: CacheLayout) -> None:
    config = tiny_config(attention_rank={"q": 8, "k": [None, 6], "v": [5, None], "o": 8})
    cache = LatentCache(config, layout, 1, 1, torch.float32)
    latent_key, latent_value = layout == "latent", layout in ("latent", "mixed")
    assert cache.forms == [(False, latent_value), (latent_key, False)]
    assert [pool.shape[1] * pool.shape[3] for pool in cache.keys] == [32, 6 if latent_key else 32]
    assert [pool.shape[1] * pool.shape[3] for pool in cache.values] == [5 if latent_value else 32, 32]


@pytest.mark.parametrize("layout", get_args(CacheLayout))
def test_tokens_come_back_in_order_through_a_shuffled_table(layout: CacheLayout) -> None:
    cache = LatentCache(tiny_config(num_key_value_heads=2), layout, 6, 4, torch.float32)
    table, length = torch.tensor([4, 0, 5]), 10
    positions = torch.arange(length)
    _, heads, _, width = cache.keys[1].shape
    _, value_heads, _, value_width = cache.values[1].shape
    keys, values = torch.randn(length, heads, width), torch.randn(length, value_heads, value_width)
    cache.write(1, (table[positions // 4], positions % 4), keys, values)
    found_keys, found_values = cache.gather(1, table[None], length, torch.float32)
    assert torch.equal(found_keys, keys[None]) and torch.equal(found_values, values[None])
    assert torch.equal(cache.gather(1, table[None], 7, torch.float32)[1], values[None, :7])
    assert torch.equal(cache.keys[1][5, :, 1], keys[9])
    assert not cache.keys[1][5, :, 2:].any() and not cache.keys[1][1:4].any() and not cache.keys[0].any()


def test_zero_clears_the_blocks_named_in_every_layer_and_no_other() -> None:
    cache = LatentCache(tiny_config(), "mixed", 4, 2, torch.float32)
    pools = cache.pools
    for pool in pools:
        pool.fill_(float("nan"))
    cache.zero(torch.tensor([1, 3]))
    for pool in pools:
        assert not pool[[1, 3]].any()
        assert pool[[0, 2]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("layout", get_args(CacheLayout))
def test_copies_of_blocks_in_every_layer(layout: CacheLayout, dtype: torch.dtype) -> None:
    cache = LatentCache(tiny_config(), layout, 5, 2, dtype)
    pools = cache.pools
    assert len(pools) == (8 if dtype is torch.int8 else 4)
    for pool in pools:
        pool.random_(-99, 99)
    before = [pool.clone() for pool in pools]
    cache.copy(torch.tensor([1, 1, 4]), torch.tensor([0, 3, 2]))
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool, old[[1, 1, 4, 1, 4]])


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.floats(width=32)))
def test_codes_and_scales_of_rows(rows: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    """Each number is within half a step of what it was, the largest one has code 127; what is not finite stays so."""
    codes, scales = quantize_rows(torch.from_numpy(rows))
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.int8, torch.bfloat16, rows.shape[:1])
    for row, code, scale in zip(rows.astype(np.float64), codes.numpy().astype(np.int64), scales.double(), strict=True):
        if not np.isfinite(row).all():
            assert not scale.isfinite()
            continue
        peak = np.abs(row).max()
        assert np.abs(code).max() <= 127
        if peak < 1e-35:  # a scale that small has few bits, or none
            assert np.abs(code * scale.item()).max() <= 2 * peak
            continue
        assert abs(scale.item() * 127 - peak) <= peak * 2**-8
        assert np.abs(code[np.abs(row) == peak]).min() == 127
        assert np.abs(code * scale.item() - row).max() <= scale.item() * 0.5001


def test_quantised_rows_read_back_as_the_write_said() -> None:
    cache = LatentCache(tiny_config(), "mixed", 3, 4, torch.int8)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(6, *pool[0].shape[0::2], generator=generator) for pool in (cache.keys[1], cache.values[1])]
    table, positions = torch.tensor([2, 0]), torch.arange(6)
    written = cache.write(1, (table[positions // 4], positions % 4), *rows)
    found = cache.gather(1, table[None], 6, torch.float32)
    for read, wrote, row in zip(found, written, rows, strict=True):
        assert torch.equal(read[0], wrote) and torch.equal(wrote, dequantize_rows(*quantize_rows(row), torch.float32))
        assert 0 < (wrote - row).abs().max() < 0.02
    assert not any(pool[1].any() for pool in cache.pools)
