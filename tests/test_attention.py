"""How a step's rows are laid out for torch's paged attention, and decode attention against a reference."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpa_model.backends.torch.attention import TILE, PagedAttention
from lpa_model.backends.torch.decode import DecodePairs, decode_attention, decode_attention_reference, decode_pairs
from lpa_model.batch import Batch, Span
from lpa_model.cache import LatentCache
from tests.tiny import tiny_config

CPU = torch.device("cpu")
BLOCK_SIZE = 8


def paged(spans: list[Span], block_size: int = BLOCK_SIZE, padding: int = 0) -> PagedAttention:
    config = tiny_config("setting1")
    cache = LatentCache(config, "latent", 100, block_size, torch.float32)
    batch = Batch.build([0] * sum(span.length for span in spans), spans, block_size)
    return PagedAttention(batch, cache, None, padding=padding)


def pairs_of(spans: list[Span], block_size: int = BLOCK_SIZE) -> DecodePairs:
    lengths = np.array([span.context + 1 for span in spans])
    return decode_pairs(lengths, [span.block_table for span in spans], block_size, CPU)


def test_metadata_of_a_mixed_batch() -> None:
    spans = [Span(9, 1, [3, 1], True), Span(0, 5, [0], False), Span(0, 5, [2], False), Span(4, 6, [5, 4], False)]
    meta = paged(spans, padding=2)
    assert meta.positions.tolist() == [9, *range(5), *range(5), *range(4, 10), 0, 0]
    assert meta.slots[0].tolist() == [1, *[0] * 5, *[2] * 5, *[5] * 4, 4, 4]
    assert meta.slots[1].tolist() == [1, *range(5), *range(5), 4, 5, 6, 7, 0, 1]
    assert meta.num_decode == 1
    first, second = meta.groups
    assert (first.rows, first.batch, first.padding) == (slice(1, 11), 2, (0, TILE - 5))
    assert (second.rows, second.context, second.blocks.tolist()) == (slice(11, 17), 4, [[5]])
    assert second.padding == (4, TILE - 10)
    for group in meta.groups:  # padding rows too see what is before them
        (mask,) = group.masks
        assert mask.sum(1).tolist() == [*range(1, TILE + 1)]


def test_shared_blocks_are_read_in_place_once_for_all_queries() -> None:
    pairs = pairs_of([Span(17, 1, [0, 1, 2], True), Span(20, 1, [0, 1, 3], True)])
    assert pairs.blocks == slice(0, 4)
    assert pairs.multiplicity == 2
    assert len(set(pairs.slot.tolist())) == len(pairs.row) == 6


def test_positions_stay_below_the_longest_query() -> None:
    """A model has no rotary position past its context, which need not be a multiple of the block size."""
    for table in ([0, 1], [90, 91]):
        pairs = pairs_of([Span(9, 1, table, True)])
        assert pairs.positions.tolist() == [list(range(8)), [8, *[9] * 7]]


def test_far_blocks_are_gathered() -> None:
    pairs = pairs_of([Span(17, 1, [40, 7, 90], True)])
    assert isinstance(pairs.blocks, Tensor)
    assert pairs.blocks.tolist() == [40, 7, 90]
    assert pairs.multiplicity == 1


@st.composite
def decode_cases(draw: st.DrawFn) -> dict[str, Any]:
    block_size = draw(st.integers(1, 6))
    prefix = draw(st.integers(0, 3))  # blocks shared by all
    contexts = draw(st.lists(st.integers(prefix * block_size, 25), min_size=1, max_size=5))
    spread = draw(st.sampled_from([1, 8]))
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    needed = prefix + sum(c // block_size + 1 for c in contexts)
    free = rng.sample(range(needed * spread), needed)
    common = [free.pop() for _ in range(prefix)]
    spans = []
    for context in contexts:
        own = [free.pop() for _ in range(context // block_size + 1 - prefix)]
        spans.append(Span(context, 1, common + own, True))
    key_heads, value_heads = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (4, 4)]))
    return {
        "spans": spans,
        "block_size": block_size,
        "blocks": needed * spread,
        "heads": draw(st.sampled_from([4, 8])),
        "key_heads": key_heads,
        "value_heads": value_heads,
        "key_width": draw(st.integers(1, 9)),
        "value_width": draw(st.integers(1, 9)),
        "size": draw(st.sampled_from([1.0, 30.0])),  # 30: scores far apart, where a softmax without a maximum overflows
        "seed": draw(st.integers(0, 1 << 30)),
    }


@given(decode_cases())
def test_decode_attention(case: dict[str, Any]) -> None:
    """Against the reference of the same signature, and against float64 over keys taken by the block table alone."""
    generator = torch.Generator().manual_seed(case["seed"])
    spans, block_size, heads = case["spans"], case["block_size"], case["heads"]

    def pool(kv_heads: int, width: int) -> Tensor:
        made = torch.full((case["blocks"], kv_heads, block_size, width), float("nan"))
        for span in spans:
            for i, block in enumerate(span.block_table):
                made[block] = 0
                filled = min(block_size, span.context + 1 - i * block_size)
                made[block, :, :filled] = torch.randn(kv_heads, filled, width, generator=generator)
        return made

    keys, values = pool(case["key_heads"], case["key_width"]), pool(case["value_heads"], case["value_width"])
    q = torch.randn(len(spans), heads, case["key_width"], generator=generator) * case["size"]
    pairs = pairs_of(spans, block_size)
    scale = 0.7
    arguments = (q, keys[pairs.blocks], values[pairs.blocks], pairs, scale)
    found = decode_attention(*arguments)
    torch.testing.assert_close(found, decode_attention_reference(*arguments), rtol=0, atol=1e-4)
    for row, span in enumerate(spans):
        tokens = [(span.block_table[t // block_size], t % block_size) for t in range(span.context + 1)]
        for head in range(heads):
            k = torch.stack([keys[b, head * case["key_heads"] // heads, o] for b, o in tokens]).double()
            v = torch.stack([values[b, head * case["value_heads"] // heads, o] for b, o in tokens]).double()
            expected = (k @ q[row, head].double() * scale).softmax(0) @ v
            torch.testing.assert_close(found[row, head].double(), expected, rtol=0, atol=1e-4)
