"""Low-dimensional projected attention as a module: projections here, and the plain causal attention of training.

Where keys and values come from a cache, a backend passes `attend`; this file chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpa_model.config import LPAConfig
from lpa_model.layers import LowRankLinear, RMSNorm, RotaryEmbedding, first_half, projection, second_half


class Attention(nn.Module):
    """q, k, v and o are each low-rank or dense (LPA paper, section 3)."""

    def __init__(self, config: LPAConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads, config.head_size
        self.scale = self.head_dim**-0.5
        self.q_proj = projection(config, "q", layer)
        self.k_proj = projection(config, "k", layer)
        self.v_proj = projection(config, "v", layer)
        self.o_proj = projection(config, "o", layer)
        self.q_norm = RMSNorm(config.head_size, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, config.eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotary: RotaryEmbedding | None, attend: Attend | None = None) -> Tensor:
        """x [batch, T, d], causal; or x [rows, d] with `attend` -> the same shape."""
        if attend is not None:
            y: Tensor = self.o_proj(attend(self, *self.latents(x)).flatten(1))
            return y
        q, k, v = self.latents(x)
        q, k, v = self.queries(q), self.keys(k), self.values(v)
        if rotary is not None:
            positions = torch.arange(x.shape[1], device=x.device)
            q, k = rotary(q, positions), rotary(k, positions)
        y = self.o_proj(self.attention(q, k, v, None).flatten(2))
        return y

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., d] -> the latents [..., r] of q, k and v; x itself for a dense projection."""
        return first_half(self.q_proj, x), first_half(self.k_proj, x), first_half(self.v_proj, x)

    def queries(self, latents: Tensor) -> Tensor:
        """[..., r] -> [..., H, dh], before positions."""
        q = self._split(second_half(self.q_proj, latents))
        return q if self.q_norm is None else self.q_norm(q)

    def keys(self, latents: Tensor) -> Tensor:
        """[..., r] -> [..., H_kv, dh], before positions."""
        k = self._split(second_half(self.k_proj, latents))
        return k if self.k_norm is None else self.k_norm(k)

    def values(self, latents: Tensor) -> Tensor:
        """[..., r] -> [..., H_kv, dh]."""
        return self._split(second_half(self.v_proj, latents))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [batch, Tq, H, dh], k and v [batch, Tk, H_kv, dh] -> [batch, Tq, H, dh]; causal without a mask."""
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.heads != self.kv_heads,
        )
        return out.transpose(1, 2)

    def key_up(self) -> Tensor:
        """B_k [H_kv, dh, r] of latent keys."""
        return self._up(self.k_proj).weight.view(self.kv_heads, self.head_dim, -1)

    def value_up(self) -> tuple[Tensor, Tensor | None]:
        """B_v [H_kv, dh, r] of latent values and its bias [H_kv, dh]."""
        up = self._up(self.v_proj)
        bias = None if up.bias is None else up.bias.view(self.kv_heads, self.head_dim)
        return up.weight.view(self.kv_heads, self.head_dim, -1), bias

    def _split(self, x: Tensor) -> Tensor:
        """[..., heads·dh] -> [..., heads, dh]."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim)

    @staticmethod
    def _up(layer: nn.Linear | LowRankLinear) -> nn.Linear:
        assert isinstance(layer, LowRankLinear), "only a low-rank projection is cached as a latent"
        return layer.up


Attend = Callable[[Attention, Tensor, Tensor, Tensor], Tensor]
"""Attention over a cache: a layer and its latents [rows, r] of q, k and v -> [rows, H, dh]."""
