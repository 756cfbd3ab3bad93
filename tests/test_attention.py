"""Every layout and path of the paged attention against the plain forward, and decode attention against a reference."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpa_model.attention import TILE, AttentionMetadata, Span
from lpa_model.cache import LatentCache
from lpa_model.config import Architecture, CacheLayout
from lpa_model.decode import decode_attention, decode_attention_reference
from lpa_model.model import LPAForCausalLM
from tests.conftest import random_model, tiny_config

CPU = torch.device("cpu")
BLOCK_SIZE = 8
MAX_POSITIONS = 52  # not a multiple of the block size
LAYOUTS: tuple[CacheLayout, ...] = get_args(CacheLayout)

CASES: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "setting1": ("setting1", {}),
    "setting1-gqa": ("setting1", {"num_key_value_heads": 2, "head_dim": 6}),
    "setting1-dense-k": ("setting1", {"attention_rank": {"q": 8, "k": None, "v": 8, "o": 8}}),
    "setting1-dense-v": ("setting1", {"attention_rank": {"q": 8, "k": 8, "v": None, "o": 8}}),
    "setting1-per-layer": ("setting1", {"attention_rank": {"q": [8, None], "k": [None, 6], "v": [5, None], "o": 8}}),
    "setting1-dense": ("setting1", {"attention_rank": None}),
    "setting2": ("setting2", {}),
    "setting2-gqa": ("setting2", {"num_key_value_heads": 2, "head_dim": 6}),
    "setting2-bias": ("setting2", {"attention_bias": True, "num_key_value_heads": 2}),
    "setting2-dense-k": ("setting2", {"attention_rank": {"q": 8, "k": None, "v": 8, "o": 8}, "attention_bias": True}),
    "setting2-dense-v": ("setting2", {"attention_rank": {"q": 8, "k": 8, "v": None, "o": 8}, "attention_bias": True}),
    "setting2-per-layer": ("setting2", {"attention_rank": {"q": [8, None], "k": [None, 6], "v": [5, None], "o": 8}}),
    "setting2-dense": ("setting2", {"attention_rank": None}),
    "setting1-mixed-ffn": ("setting1", {"ffn_rank": {"up": [7, None], "down": [None, 5]}}),
    "setting2-mixed-ffn": ("setting2", {"ffn_rank": {"gate": None, "up": 7, "down": [None, 5]}}),
    "setting2-qk-norm": ("setting2", {"qk_norm": True}),
    "setting2-qk-norm-gqa": ("setting2", {"qk_norm": True, "num_key_value_heads": 2, "attention_bias": True}),
}


@dataclass(eq=False)
class Text:
    """A text whose first `prompt` tokens are a prompt and whose others count as generated."""

    ids: list[int]
    prompt: int
    shared: int = 0  # tokens taken over from the sequence before it
    computed: int = 0
    table: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)


@dataclass
class Seen:
    """Which ways through decode attention a run has taken."""

    in_place: int = 0
    gathered: int = 0
    shared: int = 0  # a block that several queries met


class Pool:
    """Blocks in random order; a free block holds NaN, and one that is handed out is zeroed, as the engine does.

    `choice` is how many of the lowest free blocks the next one is drawn from.
    """

    def __init__(self, cache: LatentCache, rng: random.Random, choice: int) -> None:
        self.cache, self.rng, self.choice = cache, rng, choice
        self.free = list(range(cache.num_blocks))
        self.users = [0] * cache.num_blocks
        self._poison(self.free)

    def _poison(self, blocks: Sequence[int]) -> None:
        for pool in (*self.cache.keys, *self.cache.values):
            pool[list(blocks)] = float("nan")

    def allocate(self) -> int:
        self.free.sort()
        block = self.free.pop(self.rng.randrange(min(self.choice, len(self.free))))
        self.cache.zero(torch.tensor([block]))
        self.users[block] = 1
        return block

    def share(self, block: int) -> int:
        self.users[block] += 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self._poison([block])
                self.free.append(block)


def random_texts(rng: random.Random, vocab_size: int, number: int) -> list[Text]:
    """Random texts; every second one starts with the full blocks of the prompt before it."""
    made: list[Text] = []
    for i in range(number):
        if i % 2:
            shared = made[-1].prompt // BLOCK_SIZE * BLOCK_SIZE
            ids, prompt = made[-1].ids[:shared], shared + rng.randint(1, 6)
        else:
            shared, ids, prompt = 0, [], rng.randint(1, 40)
        length = rng.randint(prompt, MAX_POSITIONS)
        made.append(Text(ids + [rng.randrange(vocab_size) for _ in range(length - len(ids))], prompt, shared))
    return made


def run(model: LPAForCausalLM, layout: CacheLayout, num_blocks: int, choice: int, seed: int) -> Seen:
    """Push texts through the cache in random chunks and random company; compare every row with the plain forward."""
    rng, seen = random.Random(seed), Seen()
    cache = LatentCache(model.config, layout, num_blocks, BLOCK_SIZE, torch.float32, CPU)
    pool = Pool(cache, rng, choice)
    texts = random_texts(rng, model.config.vocab_size, 8)
    waiting, running = list(texts), list[Text]()
    while waiting or running:
        while waiting and len(running) < 4:
            text = waiting[0]
            source = texts[texts.index(text) - 1]
            if text.shared and source.computed < text.shared:
                break  # its prefix is not computed yet
            if text.shared:
                text.table = [pool.share(block) for block in source.table[: text.shared // BLOCK_SIZE]]
                text.computed = text.shared
            running.append(waiting.pop(0))
        step(model, cache, pool, rng.sample(running, rng.randint(1, len(running))), rng, seen)
        for text in [text for text in running if text.computed == len(text.ids)]:
            if any(other.shared and texts[texts.index(other) - 1] is text for other in waiting):
                continue  # somebody will share its blocks
            running.remove(text)
            pool.release(text.table)
    assert sorted(pool.free) == list(range(num_blocks))
    for text in texts:
        expected = model.logits(model(torch.tensor([text.ids]))[0, text.shared :])
        torch.testing.assert_close(torch.cat(text.rows), expected, rtol=0, atol=1e-4)
    return seen


def step(
    model: LPAForCausalLM, cache: LatentCache, pool: Pool, texts: list[Text], rng: random.Random, seen: Seen
) -> None:
    spans, padding = [], rng.randint(0, 3)
    active = [text for text in texts if text.computed < len(text.ids)]
    decodes = [text for text in active if text.computed >= text.prompt]
    prompts = [text for text in active if text.computed < text.prompt]
    for text in (*decodes, *prompts):
        left = text.prompt - text.computed
        length = rng.choice([left, rng.randint(1, left), min(left, 5)]) if left > 0 else 1
        while len(text.table) * BLOCK_SIZE < text.computed + length:
            text.table.append(pool.allocate())
        spans.append(Span(text.computed, length, text.table, left <= 0))
    if not spans:
        return
    ids = [i for text, s in zip((*decodes, *prompts), spans, strict=True) for i in text.ids[s.context :][: s.length]]
    meta = AttentionMetadata.build(spans, BLOCK_SIZE, CPU, padding)
    logits = model.logits(model(torch.tensor(ids + [1] * padding), meta, cache))
    assert len(logits) == len(ids) + padding
    at = 0
    for text, span in zip((*decodes, *prompts), spans, strict=True):
        text.rows.append(logits[at : at + span.length])
        text.computed += span.length
        at += span.length
    if meta.num_decode:
        in_place = isinstance(meta.pairs.blocks, slice)
        seen.in_place += in_place
        seen.gathered += not in_place
        seen.shared += meta.pairs.multiplicity > 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_paged_forward_equals_plain_forward(case: str, layout: CacheLayout) -> None:
    architecture, changes = CASES[case]
    model = random_model(tiny_config(architecture, max_position_embeddings=MAX_POSITIONS, **changes))
    with torch.inference_mode():
        tight = run(model, layout, num_blocks=40, choice=3, seed=len(case))
        wide = run(model, layout, num_blocks=300, choice=300, seed=len(case) + 1)
    assert tight.in_place and tight.shared and wide.gathered


def spans_meta(spans: list[Span], block_size: int = BLOCK_SIZE) -> AttentionMetadata:
    return AttentionMetadata.build(spans, block_size, CPU)


def test_metadata_of_a_mixed_batch() -> None:
    spans = [Span(9, 1, [3, 1], True), Span(0, 5, [0], False), Span(0, 5, [2], False), Span(4, 6, [5, 4], False)]
    meta = AttentionMetadata.build(spans, 8, CPU, padding=2)
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
    pairs = spans_meta([Span(17, 1, [0, 1, 2], True), Span(20, 1, [0, 1, 3], True)]).pairs
    assert pairs.blocks == slice(0, 4)
    assert pairs.multiplicity == 2
    assert len(set(pairs.slot.tolist())) == len(pairs.row) == 6


def test_positions_stay_below_the_longest_query() -> None:
    """A model has no rotary position past its context, which need not be a multiple of the block size."""
    for table in ([0, 1], [90, 91]):
        pairs = spans_meta([Span(9, 1, table, True)]).pairs
        assert pairs.positions.tolist() == [list(range(8)), [8, *[9] * 7]]


def test_far_blocks_are_gathered() -> None:
    pairs = spans_meta([Span(17, 1, [40, 7, 90], True)]).pairs
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
@settings(max_examples=100, deadline=None)
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
    pairs = spans_meta(spans, block_size).pairs
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
