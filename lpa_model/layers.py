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

    `rope_scaling` of the config changes the frequencies: of type "linear", "llama3" or "yarn", with the keys that
    Hugging Face's configs have for them. "yarn" also makes rotated queries and keys longer, by a factor in both tables.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LPAConfig) -> None:
        super().__init__()
        self.build(config, torch.device("cpu"))

    def build(self, config: LPAConfig, device: torch.device) -> None:
        """(Re)compute the tables [max_position_embeddings, dh/2], which are not part of a checkpoint."""
        frequencies, length = rope_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
        frequencies = frequencies.to(device)
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float64, device=device)
        angles = torch.outer(positions, frequencies)
        self.register_buffer("cos", (angles.cos() * length).float(), persistent=False)
        self.register_buffer("sin", (angles.sin() * length).float(), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., T, heads, dh] rotated by positions [..., T] (int64); computed in float32, returned in x's dtype."""
        cos, sin = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)  # [..., T, 1, dh/2]
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> tuple[Tensor, float]:
    """Radians per position of each pair of dimensions, float64 [dh/2], and the factor by which rotation lengthens."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if scaling is None:
        return frequencies, 1.0
    kind, factor = scaling.get("rope_type", scaling.get("type")), float(scaling["factor"])
    if kind == "linear":
        return frequencies / factor, 1.0
    original = float(scaling["original_max_position_embeddings"])
    if kind == "yarn":
        return _yarn(frequencies, theta, factor, original, scaling)
    # llama3: long wavelengths are stretched, short ones kept, those between blended
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    keep = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor), 1.0


def _yarn(
    frequencies: Tensor, theta: float, factor: float, original: float, scaling: Mapping[str, Any]
) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): pairs that turn more than `beta_fast` times within the original context are kept, those
    that turn less than `beta_slow` times are stretched by `factor`, those between blended along their index."""
    dims = 2 * len(frequencies)

    def pair(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(float(scaling.get("beta_fast") or 32)), pair(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    index = torch.arange(len(frequencies), dtype=torch.float64, device="cpu")
    stretch = ((index - first) / (last - first or 0.001)).clamp(0, 1)

    def length(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if (given := scaling.get("attention_factor")) is None:
        numerator, denominator = scaling.get("mscale"), scaling.get("mscale_all_dim")
        given = length(numerator) / length(denominator) if numerator and denominator else length(1)
    return frequencies * (stretch / factor + (1 - stretch)), float(given)


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
