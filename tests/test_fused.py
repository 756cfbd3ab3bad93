"""The decode rows of a step as one program, against the layers one after another and against float32."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lpa_model.attention import AttentionMetadata, Span
from lpa_model.cache import LatentCache
from lpa_model.config import Architecture, CacheLayout
from lpa_model.fused import can_fuse
from lpa_model.inference import prepare_for_inference
from lpa_model.kernels.attention import has_tiles
from lpa_model.model import LPAForCausalLM
from tests.conftest import random_model, tiny_config

pytestmark = pytest.mark.skipif(not has_tiles(), reason="programs need a processor with tiles of bfloat16")

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
        model.rotary.build(model.config, None)
    return model


class Texts:
    """Random texts, all but the last token of each computed into a cache by the layers."""

    def __init__(self, model: LPAForCausalLM, layout: CacheLayout) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = [torch.randint(model.config.vocab_size, (n,), generator=generator) for n in LENGTHS]
        self.cache = LatentCache(model.config, layout, 2 * len(LENGTHS), BLOCK_SIZE, torch.bfloat16, CPU)
        self.tables = [[2 * i + 1, 2 * i] for i in range(len(LENGTHS))]
        for ids, table in zip(self.ids, self.tables, strict=True):
            if len(ids) > 1:
                meta = AttentionMetadata.build([Span(0, len(ids) - 1, table, False)], BLOCK_SIZE, CPU)
                model(ids[:-1], meta, self.cache)

    def decode(self, model: LPAForCausalLM, rows: list[int]) -> Tensor:
        """The last tokens of some texts."""
        spans = [Span(len(self.ids[row]) - 1, 1, self.tables[row], True) for row in rows]
        ids = [self.ids[row][-1:] for row in rows]
        cache = copy.deepcopy(self.cache)
        return model(torch.cat(ids), AttentionMetadata.build(spans, BLOCK_SIZE, CPU), cache).float()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_a_program_is_as_exact_as_the_layers(case: str, layout: CacheLayout) -> None:
    model, exact = model_of(case), model_of(case).float()
    prepare_for_inference(model)
    assert model.fused is not None
    texts, rows = Texts(model, layout), list(range(len(LENGTHS)))
    fused = texts.decode(model, rows)
    model.fused = None
    layers = texts.decode(model, rows)
    expected = torch.stack([exact(ids[None])[0, -1] for ids in texts.ids])
    error, allowed = ((found - expected).abs().mean().item() for found in (fused, layers))
    assert 0 < error < 1.2 * allowed
    if (CASES[case][0], layout) == ("setting2", "latent") and case != "setting2-dense":
        assert torch.equal(fused, layers), "keys that have to be rebuilt go through the layers"
    else:
        assert not torch.equal(fused, layers)


def in_steps(model: LPAForCausalLM, layout: CacheLayout, chunk: int) -> list[Tensor]:
    """Errors of four texts' rows, computed a few tokens at a time; one text's count as generated from the 20th on."""
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(model.config.vocab_size, (n,), generator=generator) for n in (120, 65, 127, 33)]
    cache = LatentCache(model.config, layout, 9, BLOCK_SIZE, torch.bfloat16, CPU)
    if model.rotary is None or layout != "latent":
        for pool in (*cache.keys, *cache.values):
            pool.fill_(torch.nan)  # kernels do not look at what nobody has written
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
    exact = model_of_same(model)
    return [torch.cat(rows) - exact(ids[None])[0] for rows, ids in zip(found, texts, strict=True)]


def model_of_same(model: LPAForCausalLM) -> LPAForCausalLM:
    """The float32 model of the same config and weights."""
    case = next(name for name in CASES if model_of(name).config == model.config)
    return model_of(case).float()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_prompt_rows_are_as_exact_as_in_the_layers(case: str, layout: CacheLayout) -> None:
    model = model_of(case)
    prepare_for_inference(model)
    fused = [in_steps(model, layout, chunk) for chunk in (16, 61)]
    model.fused = None
    layers = in_steps(model, layout, 61)
    allowed = 1.3 * torch.cat(layers).abs().mean()
    for errors in fused:
        assert torch.cat(errors).abs().mean() < allowed


@pytest.mark.parametrize("case", ["setting1", "setting2"])
@torch.inference_mode()
def test_a_row_depends_on_itself_alone(case: str) -> None:
    model = model_of(case)
    prepare_for_inference(model)
    texts = Texts(model, "mixed" if case == "setting2" else "latent")
    everyone = list(range(len(LENGTHS)))
    together = texts.decode(model, everyone)
    torch.set_num_threads(2)
    try:
        assert torch.equal(texts.decode(model, everyone), together)
    finally:
        torch.set_num_threads(1)
    for row in everyone:
        assert torch.equal(texts.decode(model, [row])[0], together[row])
    assert torch.equal(texts.decode(model, everyone[::-1]), together.flip(0))


@torch.inference_mode()
def test_sizes_that_do_not_fit_tiles_go_through_the_layers() -> None:
    for changes in ({"intermediate_size": 80}, {"head_dim": 16}, {"attention_rank": 24}, {"ffn_rank": 32}):
        model = random_model(tiny_config("setting2", **{**SIZES, **changes})).bfloat16()
        assert not can_fuse(model), changes
    assert can_fuse(model_of("setting2"))
    assert not can_fuse(model_of("setting2").float())
