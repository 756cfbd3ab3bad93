"""Sizes, counts and refusals of LPAConfig, against the modules that are built from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpa_model.cache import LatentCache, bytes_per_token
from lpa_model.config import FORMAT_VERSION, PRESETS, Architecture, CacheLayout, LPAConfig, Projection
from lpa_model.model import LPAForCausalLM
from tests.tiny import tiny_config

PER_LAYER = {"q": [8, None], "k": [None, 6], "v": 5, "o": [3, 9]}
ODD: list[dict[str, Any]] = [
    {"attention_rank": None},
    {"attention_rank": None, "ffn_rank": 7},
    {"ffn_rank": 7},
    {"attention_rank": PER_LAYER},
    {"attention_rank": PER_LAYER, "num_key_value_heads": 2, "head_dim": 6},
    {"num_key_value_heads": 1, "lm_head_bias": True},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": True, "lm_head_bias": True, "head_dim": 10},
]
OLD = """{
  "model_type": "lpa",
  "architecture": "setting1",
  "vocab_size": 300,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 128,
  "num_key_value_heads": 4,
  "head_dim": 8,
  "attention_rank": {"q": [8, null], "k": [null, 6], "v": 5, "o": [3, 9]},
  "ffn_rank": 7,
  "attention_bias": false,
  "lm_head_bias": true,
  "tie_word_embeddings": false,
  "rope_theta": 10000.0,
  "rope_scaling": null,
  "norm_eps": 1e-05,
  "bos_token_id": null,
  "eos_token_id": 0
}"""
"""A config.json as it was written before files carried a version."""


def count(config: LPAConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LPAForCausalLM(config).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_of_presets(name: str) -> None:
    assert PRESETS[name].parameter_count() == count(PRESETS[name])


@pytest.mark.parametrize("changes", ODD)
def test_parameter_count_of_odd_combinations(architecture: Architecture, changes: dict[str, Any]) -> None:
    config = tiny_config(architecture, **changes)
    assert config.parameter_count() == count(config)


@pytest.mark.parametrize("attention_rank", [None, 8, PER_LAYER])
def test_parameter_count_with_attention_bias(attention_rank: Any) -> None:
    config = tiny_config("setting2", attention_bias=True, attention_rank=attention_rank, num_key_value_heads=2)
    assert config.parameter_count() == count(config)


def test_presets_have_the_published_sizes() -> None:
    small, large, three = (PRESETS[f"lpa-{size}"] for size in ("130m", "370m", "3b"))
    assert (small.architecture, small.hidden_size, small.intermediate_size) == ("setting2", 768, 2048)
    assert (small.num_attention_heads, small.num_hidden_layers, small.attention_rank) == (12, 12, 128)
    assert (large.architecture, large.hidden_size, large.intermediate_size) == ("setting1", 1024, 4096)
    assert (large.num_attention_heads, large.num_hidden_layers, large.attention_rank) == (8, 24, 320)
    assert 2.7e9 < three.parameter_count() < 3.3e9
    assert {config.max_position_embeddings for config in (small, large, three)} == {2048}
    for name, config in PRESETS.items():
        twin = PRESETS["vanilla-" + name.split("-", 1)[1]]
        assert twin == dataclasses.replace(config, attention_rank=None, ffn_rank=None)
        assert twin.parameter_count() >= config.parameter_count()


@pytest.mark.parametrize("layout", get_args(CacheLayout))
@pytest.mark.parametrize("changes", ODD)
def test_cache_elements_are_those_of_the_pools(
    architecture: Architecture, changes: dict[str, Any], layout: CacheLayout
) -> None:
    config = tiny_config(architecture, **changes)
    cache = LatentCache(config, layout, 3, 4, torch.bfloat16)
    elements = sum(pool.numel() for pool in (*cache.keys, *cache.values))
    assert config.cache_elements_per_token(layout) * 3 * 4 == elements
    assert bytes_per_token(config, layout, torch.bfloat16) * 3 * 4 == elements * 2
    quantized = LatentCache(config, layout, 3, 4, torch.int8)
    assert bytes_per_token(config, layout, torch.int8) * 3 * 4 == sum(pool.nbytes for pool in quantized.pools)


def test_cache_elements_of_the_published_models() -> None:
    """The table of section 4 of the model's description, per layer."""
    expected = {"lpa-370m": (640, 1344, 2048), "lpa-130m": (256, 896, 1536)}
    for name, elements in expected.items():
        config = PRESETS[name]
        layouts: tuple[CacheLayout, ...] = ("latent", "mixed", "full")
        for layout, per_layer in zip(layouts, elements, strict=True):
            assert config.cache_elements_per_token(layout) == per_layer * config.num_hidden_layers


@pytest.mark.parametrize(
    ("architecture", "changes", "layout"),
    [
        ("setting1", {}, "latent"),
        ("setting2", {}, "mixed"),
        ("setting1", {"attention_rank": None}, "full"),
        ("setting2", {"attention_rank": None}, "full"),
        ("setting1", {"attention_rank": {"q": 8, "k": None, "v": 8, "o": 8}}, "mixed"),
        ("setting1", {"attention_rank": {"q": 8, "k": 8, "v": None, "o": 8}}, "latent"),
        ("setting2", {"attention_rank": {"q": 8, "k": 8, "v": None, "o": 8}}, "full"),
        ("setting2", {"attention_rank": 20, "num_key_value_heads": 1}, "full"),  # 20 is more than one head of 8
    ],
)
def test_default_cache_layout(architecture: Architecture, changes: dict[str, Any], layout: str) -> None:
    assert tiny_config(architecture, **changes).default_cache_layout() == layout


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("setting3", {}, "architecture: 'setting3'"),
        ("setting2", {"vocab_size": 0}, "vocab_size: 0"),
        ("setting2", {"hidden_size": "32"}, "hidden_size: '32'"),
        ("setting2", {"num_hidden_layers": True}, "num_hidden_layers: True"),
        ("setting2", {"max_position_embeddings": 1.5}, "max_position_embeddings: 1.5"),
        ("setting2", {"num_attention_heads": 5}, "head_dim: hidden_size 32"),
        ("setting2", {"head_dim": 7}, "head_dim: 7 is odd"),
        ("setting2", {"head_dim": 0}, "head_dim: 0"),
        ("setting2", {"num_key_value_heads": 3}, "num_key_value_heads: 3"),
        ("setting2", {"num_key_value_heads": 0}, "num_key_value_heads: 0"),
        ("setting2", {"num_key_value_heads": "4"}, "num_key_value_heads: '4'"),
        ("setting2", {"attention_rank": 0}, r"attention_rank \(q, layer 0\): 0"),
        ("setting2", {"attention_rank": {"q": 8}}, "attention_rank: keys"),
        ("setting2", {"attention_rank": {"q": 8, "k": [8], "v": 8, "o": 8}}, "attention_rank: k lists 1 ranks for 2"),
        ("setting2", {"attention_rank": {"q": 8, "k": [8, -1], "v": 8, "o": 8}}, r"attention_rank \(k, layer 1\): -1"),
        ("setting2", {"ffn_rank": 2.0}, r"ffn_rank \(gate, layer 0\): 2.0"),
        ("setting2", {"ffn_rank": {"gate": 8, "up": [8, 0], "down": 8}}, r"ffn_rank \(up, layer 1\): 0"),
        ("setting2", {"ffn_rank": {"gate": 8, "up": [8] * 3, "down": 8}}, "ffn_rank: up lists 3 ranks for 2 layers"),
        ("setting2", {"ffn_rank": {"up": 8, "down": 8}}, "ffn_rank: keys .* are not exactly gate, up, down"),
        ("setting1", {"ffn_rank": {"gate": 8, "up": 8, "down": 8}}, "ffn_rank: keys .* are not exactly up, down"),
        ("setting2", {"attention_rank": {"q": 8, "k": 8, "v": [33, 8], "o": 8}}, r"attention_rank \(v, layer 0\): 33"),
        ("setting1", {"ffn_rank": {"up": 8, "down": [8, 49]}}, r"ffn_rank \(down, layer 1\): 49 is more than 48"),
        ("setting2", {"ffn_rank": "8"}, r"ffn_rank \(gate, layer 0\): '8'"),
        ("setting2", {"qk_norm": 1}, "qk_norm: 1"),
        ("setting1", {"qk_norm": True}, "qk_norm: setting 1"),
        ("setting2", {"rope_theta": 0}, "rope_theta: 0"),
        ("setting2", {"rope_theta": "10000"}, "rope_theta: '10000'"),
        ("setting2", {"norm_eps": -1e-6}, "norm_eps: -1e-06"),
        ("setting2", {"lm_head_bias": "yes"}, "lm_head_bias: 'yes'"),
        ("setting2", {"eos_token_id": 300}, "eos_token_id: 300"),
        ("setting2", {"bos_token_id": [1]}, r"bos_token_id: \[1\]"),
        ("setting2", {"rope_scaling": "linear"}, "rope_scaling: 'linear'"),
        ("setting2", {"rope_scaling": {"type": "longrope", "factor": 2}}, "rope_scaling: type 'longrope'"),
        ("setting2", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor None"),
        ("setting2", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: low_freq_factor"),
        ("setting1", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling: setting 1"),
        ("setting1", {"attention_bias": True}, "attention_bias: setting 1"),
    ],
)
def test_refusals_name_the_key(architecture: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        tiny_config(architecture, **changes)


@pytest.mark.parametrize("changes", ODD)
def test_json_round_trip(architecture: Architecture, changes: dict[str, Any]) -> None:
    config = tiny_config(architecture, **changes)
    assert LPAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@st.composite
def configs(draw: st.DrawFn) -> tuple[LPAConfig, dict[str, list[int | None]]]:
    """A config of one to three layers with random ranks, and the rank of each projection and layer."""
    architecture = draw(st.sampled_from(get_args(Architecture)))
    layers, rank = draw(st.integers(1, 3)), st.none() | st.integers(1, 32)
    ranks: dict[str, list[int | None]] = {}

    def spec(*names: str) -> Any:
        if draw(st.booleans()):
            same = draw(rank)
            ranks.update({name: [same] * layers for name in names})
            return same
        written: dict[str, Any] = {}
        for name in draw(st.permutations(names)):
            written[name] = draw(rank | st.lists(rank, min_size=layers, max_size=layers))
            ranks[name] = written[name] if isinstance(written[name], list) else [written[name]] * layers
        return written

    config = tiny_config(
        architecture,
        num_hidden_layers=layers,
        attention_rank=spec("q", "k", "v", "o"),
        ffn_rank=spec("up", "down") if architecture == "setting1" else spec("gate", "up", "down"),
        num_key_value_heads=draw(st.sampled_from([1, 2, 4])),
        qk_norm=architecture == "setting2" and draw(st.booleans()),
        attention_bias=architecture == "setting2" and draw(st.booleans()),
        lm_head_bias=draw(st.booleans()),
    )
    return config, ranks


@given(configs())
def test_any_ranks_come_back_and_are_counted(case: tuple[LPAConfig, dict[Projection, list[int | None]]]) -> None:
    config, ranks = case
    assert {name: [config.rank(name, i) for i in range(config.num_hidden_layers)] for name in ranks} == ranks
    assert set(config.projections) == set(ranks)
    assert LPAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.parameter_count() == count(config)
    with torch.device("meta"):
        model = LPAForCausalLM(config)
    for layer, block in enumerate(model.layers):
        for name in config.projections:
            module = getattr(block.attention if name in "qkvo" else block.ffn, f"{name}_proj")
            factors = [part.weight for part in (getattr(module, "down", None), getattr(module, "up", None)) if part]
            assert (len(factors[0]) if factors else None) == ranks[name][layer]
            assert config.weight_count(name, layer) == sum(w.numel() for w in factors or [module.weight])
    assert count(config.vanilla()) == config.vanilla().parameter_count()
    assert not any(config.vanilla().rank(name, 0) for name in ranks)
    layout: CacheLayout
    for layout in get_args(CacheLayout):
        forms = [config.cache_forms(layout, layer) for layer in range(config.num_hidden_layers)]
        assert [keys for keys, _ in forms] == [
            layout == "latent" and rank is not None and not config.qk_norm for rank in ranks["k"]
        ]


def test_files_without_a_version_are_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(OLD)
    config = LPAConfig.load(path)
    assert config == tiny_config("setting1", attention_rank=PER_LAYER, ffn_rank=7, lm_head_bias=True)
    assert [config.rank(name, 1) for name in config.projections] == [None, 6, 5, 9, 7, 7]
    assert not config.qk_norm


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    values = tiny_config().to_dict()
    assert values["format_version"] == FORMAT_VERSION == 2
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, "format_version": 3, "num_experts": 8}))  # before keys that it may bring
    with pytest.raises(ValueError, match=r"config\.json: format_version 3 is newer than this version reads \(2\)"):
        LPAConfig.load(path)
    for version in (0, "2", True, None, 1.0):
        with pytest.raises(ValueError, match=r"format_version: .* is not a positive integer"):
            LPAConfig.from_dict({**values, "format_version": version})


def test_defaults_follow_the_architecture() -> None:
    assert (tiny_config("setting1").eps, tiny_config("setting2").eps) == (1e-5, 1e-6)
    assert (tiny_config().head_size, tiny_config().kv_heads) == (8, 4)


def test_load_names_the_file_and_the_key(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    values = tiny_config().to_dict()
    cases = [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({**values, "num_experts": 8}), "unknown keys num_experts"),
        (json.dumps({key: value for key, value in values.items() if key != "vocab_size"}), "missing keys vocab_size"),
        (json.dumps({**values, "head_dim": 3}), "head_dim: 3"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            LPAConfig.load(path)
        assert str(path) in str(caught.value)
