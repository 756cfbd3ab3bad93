"""The parts a block is made of: low-rank and dense linear layers, norms, rotary positions, feed-forward layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpa_model.config import LPAConfig, Projection


class LowRankLinear(nn.Module):
    """y = up(down(x)): a [out, in] matrix as the product of two thin ones (LPA paper, section 3).

    `down` is A of the paper, weight [rank, in]; `up` is B, weight [out, rank].
    """

    def __init__(self, width_in: int, width_out: int, rank: int, bias_down: bool, bias_up: bool) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=bias_down)
        self.up = nn.Linear(rank, width_out, bias=bias_up)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the weights' dtype."""
        y: Tensor = self.up(self.down(x))
        return y


def first_half(layer: nn.Module, x: Tensor) -> Tensor:
    """x [..., in] -> [..., rank], A's product; x itself for a dense layer."""
    y: Tensor = layer.down(x) if isinstance(layer, LowRankLinear) else x
    return y


def second_half(layer: nn.Module, x: Tensor) -> Tensor:
    """What remains after `first_half`: [..., rank] (low-rank) or [..., in] (dense) -> [..., out]."""
    y: Tensor = layer.up(x) if isinstance(layer, LowRankLinear) else layer(x)
    return y


def projection(config: LPAConfig, name: Projection, layer: int) -> nn.Linear | LowRankLinear:
    """A projection of one layer, low-rank or dense, with the biases of the published code.

    In setting 1 a projection out of the stream has its bias on A, one back into it on B, and a dense one has one, too.
    """
    width_in, width_out = config.projection_sizes(name)
    rank = config.rank(name, layer)
    one, into_stream = config.architecture == "setting1", name in ("o", "down")
    bias = config.attention_bias and name in ("q", "k", "v")
    if rank is None:
        return nn.Linear(width_in, width_out, bias=one or bias)
    return LowRankLinear(width_in, width_out, rank, one and not into_stream, (one and into_stream) or bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; computed in float32, returned in the weight's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] float32 -> [..., size]."""
        x = x.float()
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # one pass; F.rms_norm stores the squares
        scale: Tensor = (norm.square() / x.shape[-1] + self.eps).rsqrt()
        return (x * scale).to(self.weight.dtype) * self.weight


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias over the last axis; computed and returned in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> float32 [..., size]."""
        y: Tensor = F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        return y


class RotaryEmbedding(nn.Module):
    """Rotary positions in the rotate-half convention of LLaMA: dimension i rotates with dimension i + dh/2.

    `scaling`: None, {"rope_type": "linear", "factor"} or {"rope_type": "llama3", "factor", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings"}, as in Hugging Face's configs.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LPAConfig) -> None:
        super().__init__()
        self.build(config, torch.device("cpu"))

    def build(self, config: LPAConfig, device: torch.device) -> None:
        """(Re)compute the tables [max_position_embeddings, dh/2], which are not part of a checkpoint."""
        exponents = torch.arange(0, config.head_size, 2, dtype=torch.float64, device=device) / config.head_size
        frequencies = _scaled(config.rope_theta**-exponents, config.rope_scaling)  # [dh/2]
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float64, device=device)
        angles = torch.outer(positions, frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., T, heads, dh] rotated by positions [..., T] (int64); computed in float32, returned in x's dtype."""
        cos, sin = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)  # [..., T, 1, dh/2]
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _scaled(frequencies: Tensor, scaling: Mapping[str, Any] | None) -> Tensor:
    if scaling is None:
        return frequencies
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return frequencies / float(scaling["factor"])
    # llama3: long wavelengths are stretched, short ones kept, those between blended
    wavelengths = 2 * math.pi / frequencies
    ratio = float(scaling["original_max_position_embeddings"]) / wavelengths
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    keep = ((ratio - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / float(scaling["factor"]))


class ReluFFN(nn.Module):
    """Setting 1: down(relu(up(x)))."""

    def __init__(self, config: LPAConfig, layer: int) -> None:
        super().__init__()
        self.up_proj = projection(config, "up", layer)
        self.down_proj = projection(config, "down", layer)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        y: Tensor = self.down_proj(F.relu(self.up_proj(x)))
        return y


class SwiGLU(nn.Module):
    """Setting 2: down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, config: LPAConfig, layer: int) -> None:
        super().__init__()
        self.gate_proj = projection(config, "gate", layer)
        self.up_proj = projection(config, "up", layer)
        self.down_proj = projection(config, "down", layer)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y
