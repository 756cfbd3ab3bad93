"""A step as one program, against the layers one after another and against float32."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lpa_model.attention import AttentionMetadata, Span
from lpa_model.cache import LatentCache
from lpa_model.config import Architecture, CacheLayout
from lpa_model.fused import can_fuse
from lpa_model.inference import prepare_for_inference
from lpa_model.kernels.instructions import paired_products
from lpa_model.model import LPAForCausalLM
from tests.conftest import in_pairs, random_model, tiny_config

pytestmark = pytest.mark.skipif(
    not paired_products(), reason="programs need a processor that multiplies pairs of bfloat16"
)

CPU = torch.device("cpu")
BLOCK_SIZE = 64
LENGTHS = [1, 2, 63, 64, 65, 100, 128, 17, 5, 77, 31, 32, 33, 90, 111, 12, 3, 70, 80, 99]  # with the new token
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 32, "attention_rank": 32}
CASES: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "setting1": ("setting1", {}),
    "setting1-gqa": ("setting1", {"num_key_value_heads": 2}),
    "setting1-ffn": ("setting1", {"ffn_rank": 32}),
    "setting1-per-layer": (
        "setting1",
        {"attention_rank": {"q": [32, None], "k": [None, 64], "v": [96, None], "o": 32}},
    ),
    "setting2": ("setting2", {}),
    "setting2-gqa-bias": ("setting2", {"num_key_value_heads": 2, "attention_bias": True}),
    "setting2-per-layer": (
        "setting2",
        {"attention_rank": {"q": [32, None], "k": [None, 64], "v": [96, None], "o": None}},
    ),
    "setting2-dense": ("setting2", {"attention_rank": None}),
}
LAYOUTS: tuple[CacheLayout, ...] = get_args(CacheLayout)


def model_of(case: str) -> LPAForCausalLM:
    architecture, changes = CASES[case]
    model = random_model(tiny_config(architecture, **{**SIZES, **changes})).bfloat16()
    if model.rotary is not None:
        model.rotary.build(model.config, CPU)
    return model


class Texts:
    """Random texts, all but the last token of each computed into a cache by the layers."""

    def __init__(self, model: LPAForCausalLM, cache: LatentCache) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = [torch.randint(model.config.vocab_size, (n,), generator=generator) for n in LENGTHS]
        self.cache = cache
        self.tables = [[2 * i + 1, 2 * i] for i in range(len(LENGTHS))]
        for ids, table in zip(self.ids, self.tables, strict=True):
            if len(ids) > 1:
                meta = AttentionMetadata.build([Span(0, len(ids) - 1, table, False)], BLOCK_SIZE, CPU)
                model(ids[:-1], meta, self.cache)

    def decode(self, model: LPAForCausalLM, cache: LatentCache, rows: list[int]) -> Tensor:
        """The last tokens of some texts; they may be computed again."""
        spans = [Span(len(self.ids[row]) - 1, 1, self.tables[row], True) for row in rows]
        ids = [self.ids[row][-1:] for row in rows]
        return model(torch.cat(ids), AttentionMetadata.build(spans, BLOCK_SIZE, CPU), cache).float().clone()


def both(case: str, layout: CacheLayout, blocks: int) -> tuple[list[LPAForCausalLM], list[LatentCache]]:
    """A model whose steps are programs where they can be, and one that computes them in its layers; caches."""
    models = [model_of(case), model_of(case)]
    caches = [LatentCache(model.config, layout, blocks, BLOCK_SIZE, torch.bfloat16, CPU) for model in models]
    prepare_for_inference(models[0], caches[0])
    prepare_for_inference(models[1])
    rebuilds = models[0].rotary is not None and any(keys_latent for keys_latent, _ in caches[0].forms)
    assert (models[0].fused is None) == rebuilds, "keys that have to be rebuilt go through the layers"
    assert models[1].fused is None
    return models, caches


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_a_program_is_as_exact_as_the_layers(case: str, layout: CacheLayout) -> None:
    models, caches = both(case, layout, 2 * len(LENGTHS))
    exact = model_of(case).float()
    texts = Texts(models[1], caches[1])
    for pool, other in zip(caches[0].keys, caches[1].keys, strict=True):
        pool.copy_(other)
    for pool, other in zip(caches[0].values, caches[1].values, strict=True):
        pool.copy_(other if models[0].fused is None else in_pairs(other))
    rows = list(range(len(LENGTHS)))
    fused, layers = (texts.decode(model, cache, rows) for model, cache in zip(models, caches, strict=True))
    expected = torch.stack([exact(ids[None])[0, -1] for ids in texts.ids])
    error, allowed = ((found - expected).abs().mean().item() for found in (fused, layers))
    assert 0 < error < 1.2 * allowed
    assert torch.equal(fused, layers) == (models[0].fused is None)


def in_steps(model: LPAForCausalLM, cache: LatentCache, chunk: int) -> list[Tensor]:
    """Four texts' rows, computed a few tokens at a time; one text's count as generated from the 20th on."""
    texts = four_texts(model)
    if model.fused is not None:
        for pool in (*cache.keys, *cache.values):
            pool.fill_(torch.nan)  # programs do not look at what nobody has written
    tables = [[7, 2], [1, 8], [0, 4], [3, 5]]
    found: list[list[Tensor]] = [[] for _ in texts]
    while any(sum(map(len, rows)) < len(ids) for rows, ids in zip(found, texts, strict=True)):
        spans = []
        for i, (rows, ids) in enumerate(zip(found, texts, strict=True)):
            done = sum(map(len, rows))
            decodes = i == 3 and done >= 20
            if count := min(1 if decodes else 20 if i == 3 else chunk + 7 * i, len(ids) - done):
                spans.append((i, Span(done, count, tables[i], decodes)))
        spans.sort(key=lambda pair: not pair[1].decode)
        ids = torch.cat([texts[i][span.context : span.context + span.length] for i, span in spans])
        meta = AttentionMetadata.build([span for _, span in spans], BLOCK_SIZE, CPU)
        hidden = model(ids, meta, cache).float().clone()
        for (i, _), part in zip(spans, hidden.split([span.length for _, span in spans]), strict=True):
            found[i].append(part)
    return [torch.cat(rows) for rows in found]


def four_texts(model: LPAForCausalLM) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(model.config.vocab_size, (n,), generator=generator) for n in (120, 65, 127, 33)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_prompt_rows_are_as_exact_as_in_the_layers(case: str, layout: CacheLayout) -> None:
    models, caches = both(case, layout, 9)
    exact = model_of(case).float()
    expected = torch.cat([exact(ids[None])[0] for ids in four_texts(exact)])
    layers = torch.cat(in_steps(models[1], caches[1], 61)) - expected
    for chunk in (16, 61, 128):
        fused = torch.cat(in_steps(models[0], caches[0], chunk)) - expected
        assert fused.abs().mean() < 1.3 * layers.abs().mean()


@pytest.mark.parametrize("case", ["setting1", "setting2", "setting1-ffn"])
@torch.inference_mode()
def test_rows_do_not_depend_on_the_steps_that_they_come_in(case: str) -> None:
    (model, _), (cache, _) = both(case, "mixed" if case == "setting2" else "latent", 9)
    whole = in_steps(model, cache, 128)
    for chunk in (1, 16, 61):
        for part, expected in zip(in_steps(model, cache, chunk), whole, strict=True):
            assert torch.equal(part, expected)


@pytest.mark.parametrize("case", ["setting1", "setting2"])
@torch.inference_mode()
def test_a_row_depends_on_itself_alone(case: str) -> None:
    (model, _), (cache, _) = both(case, "mixed" if case == "setting2" else "latent", 2 * len(LENGTHS))
    texts = Texts(model, cache)
    everyone = list(range(len(LENGTHS)))
    together = texts.decode(model, cache, everyone)
    torch.set_num_threads(2)
    try:
        assert torch.equal(texts.decode(model, cache, everyone), together)
    finally:
        torch.set_num_threads(1)
    for row in everyone:
        assert torch.equal(texts.decode(model, cache, [row])[0], together[row])
    assert torch.equal(texts.decode(model, cache, everyone[::-1]), together.flip(0))
    logits = model.head(together)
    assert torch.equal(logits[3], model.head(together[3:4])[0])


@torch.inference_mode()
def test_a_vocabulary_need_not_fill_tiles() -> None:
    model = random_model(tiny_config("setting1", **SIZES, vocab_size=301, lm_head_bias=True)).bfloat16()
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = model.logits(hidden)
    prepare_for_inference(model, LatentCache(model.config, "latent", 2, BLOCK_SIZE, torch.bfloat16, CPU))
    assert model.fused is not None
    found = model.logits(hidden)
    assert found.shape == (5, 301)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.01)


@torch.inference_mode()
def test_sizes_that_do_not_fit_tiles_go_through_the_layers() -> None:
    def fuses(model: LPAForCausalLM, block_size: int = BLOCK_SIZE) -> bool:
        cache = LatentCache(model.config, "mixed", 2, block_size, model.embed_tokens.weight.dtype, CPU)
        return can_fuse(model, cache)

    for changes in (
        {"intermediate_size": 80},
        {"head_dim": 16},
        {"attention_rank": 24},
        {"ffn_rank": 32},
        {"ffn_rank": {"gate": None, "up": 32, "down": None}},
        {"qk_norm": True},
    ):
        model = random_model(tiny_config("setting2", **{**SIZES, **changes})).bfloat16()
        assert not fuses(model), changes
    assert fuses(model_of("setting2"))
    assert not fuses(model_of("setting2"), 16)
    assert not fuses(model_of("setting2").float())
