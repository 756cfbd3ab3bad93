"""Norms, rotary positions and low-rank layers against formulas written out here, one number at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpa_model.layers import LayerNorm, LowRankLinear, ReluFFN, RMSNorm, RotaryEmbedding, SwiGLU
from tests.tiny import tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def frequency(pair: int, head_dim: int, theta: float, scaling: dict[str, Any] | None) -> float:
    """Radians per position of dimensions `pair` and `pair + head_dim/2`."""
    plain = 1.0 / theta ** (2 * pair / head_dim)
    if scaling is None:
        return plain
    if scaling["rope_type"] == "linear":
        return float(plain / scaling["factor"])
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)  # over the original context
    if turns < scaling["low_freq_factor"]:
        return float(plain / scaling["factor"])
    if turns > scaling["high_freq_factor"]:
        return plain
    smooth = (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
    return float((1 - smooth) * plain / scaling["factor"] + smooth * plain)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3])
@pytest.mark.parametrize("theta", [100.0, 10000.0])
def test_rotary_positions_turn_pairs(scaling: dict[str, Any] | None, theta: float) -> None:
    head_dim = 16
    rotary = RotaryEmbedding(tiny_config(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling))
    positions = torch.tensor([0, 1, 5, 127])
    x = torch.randn(4, 2, head_dim, generator=torch.Generator().manual_seed(0))
    found = rotary(x, positions)
    for row, position in enumerate(positions.tolist()):
        for head in range(2):
            for pair in range(head_dim // 2):
                angle = position * frequency(pair, head_dim, theta, scaling)
                a, b = x[row, head, pair].item(), x[row, head, pair + head_dim // 2].item()
                assert found[row, head, pair].item() == pytest.approx(
                    a * math.cos(angle) - b * math.sin(angle), abs=1e-5
                )
                assert found[row, head, pair + head_dim // 2].item() == pytest.approx(
                    b * math.cos(angle) + a * math.sin(angle), abs=1e-5
                )


def test_llama3_scaling_is_tried_in_all_its_three_ranges() -> None:
    plain = [frequency(pair, 16, 100.0, None) for pair in range(8)]
    ratios = {round(frequency(pair, 16, 100.0, LLAMA3) / plain[pair], 6) for pair in range(8)}
    assert {1.0, 0.125} < ratios


@given(shift=st.integers(0, 60), first=st.integers(0, 60), second=st.integers(0, 60))
def test_rotary_scores_depend_on_the_distance_alone(shift: int, first: int, second: int) -> None:
    rotary = RotaryEmbedding(tiny_config())
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(1))

    def score(query: int, key: int) -> float:
        return float((rotary(q, torch.tensor([query])) * rotary(k, torch.tensor([key]))).sum())

    assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = RMSNorm(5, 0.25).to(dtype)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5, 0.0, 4.0]).to(dtype)
    x = torch.tensor([3.0, -1.0, 0.5, 2.0, 10.0])
    rms = math.sqrt((9 + 1 + 0.25 + 4 + 100) / 5 + 0.25)
    expected = torch.tensor([3 / rms, 2 / rms, 0.25 / rms, 0.0, 40 / rms])
    found = norm(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_returns_float32(dtype: torch.dtype) -> None:
    norm = LayerNorm(4, 0.5).to(dtype)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5, 4.0]).to(dtype)
    norm.bias.data = torch.tensor([0.0, 1.0, -1.0, 0.5]).to(dtype)
    x = torch.tensor([1.0, 2.0, 3.0, 10.0])  # mean 4, variance 12.5
    expected = torch.tensor([-3.0, -2.0, -1.0, 6.0]) / math.sqrt(13) * torch.tensor([1.0, -2.0, 0.5, 4.0])
    found = norm(x.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected + torch.tensor([0.0, 1.0, -1.0, 0.5]), rtol=1e-5, atol=1e-6)


def dense(layer: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """(matrix [out, in], bias) of any projection, by what it does to the zero vector and the unit vectors."""
    width = (layer.down if isinstance(layer, LowRankLinear) else layer).weight.shape[1]
    assert isinstance(width, int)
    bias = layer(torch.zeros(width))
    return (layer(torch.eye(width)) - bias).T, bias


def test_low_rank_linear_is_the_product_of_its_factors() -> None:
    layer = LowRankLinear(6, 5, 2, bias_down=True, bias_up=True)
    matrix, bias = dense(layer)
    torch.testing.assert_close(matrix, layer.up.weight @ layer.down.weight)
    torch.testing.assert_close(bias, layer.up.weight @ layer.down.bias + layer.up.bias)
    assert torch.linalg.matrix_rank(matrix) == 2


@pytest.mark.parametrize("rank", [None, 3])
def test_feed_forward_layers(rank: int | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 6)
    sizes = {"hidden_size": 6, "num_attention_heads": 1, "intermediate_size": 9, "attention_rank": None}
    relu = ReluFFN(tiny_config("setting1", **sizes, ffn_rank={"up": rank, "down": [2, rank]}), layer=1)
    gated = SwiGLU(tiny_config("setting2", **sizes, ffn_rank={"gate": [rank, 5], "up": rank, "down": None}), layer=0)
    (up, up_bias), (down, down_bias) = dense(relu.up_proj), dense(relu.down_proj)
    torch.testing.assert_close(relu(x), (x @ up.T + up_bias).clamp(min=0) @ down.T + down_bias, atol=1e-6, rtol=1e-5)
    assert up_bias.abs().max() > 0 and down_bias.abs().max() > 0
    (gate, _), (up, _), (down, _) = dense(gated.gate_proj), dense(gated.up_proj), dense(gated.down_proj)
    hidden = x @ gate.T
    expected = (hidden / (1 + (-hidden).exp()) * (x @ up.T)) @ down.T
    torch.testing.assert_close(gated(x), expected, atol=1e-6, rtol=1e-5)
    assert all("bias" not in name for name, _ in gated.named_parameters())
