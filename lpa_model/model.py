"""The LPA transformer in both published settings (LPA.md section 2).

The residual stream is float32 whatever the weights are; norms hand their result to the products in the weights'
dtype. Logits are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lpa_model.attention import Attention, AttentionMetadata
from lpa_model.cache import LatentCache
from lpa_model.config import LPAConfig
from lpa_model.fused import FusedStep
from lpa_model.layers import LayerNorm, ReluFFN, RMSNorm, RotaryEmbedding, SwiGLU


class Setting1Block(nn.Module):
    """x + norm1(attention(x)), then x + norm2(ffn(x)): the norm is on the branch's output."""

    def __init__(self, config: LPAConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.attention_norm = LayerNorm(config.hidden_size, config.eps)
        self.ffn = ReluFFN(config, layer)
        self.ffn_norm = LayerNorm(config.hidden_size, config.eps)

    def forward(
        self, x: Tensor, rotary: RotaryEmbedding | None, meta: AttentionMetadata | None, cache: LatentCache | None
    ) -> Tensor:
        """x [..., d] float32 -> [..., d] float32."""
        dtype = self.attention_norm.weight.dtype
        x = x + self.attention_norm(self.attention(x.to(dtype), rotary, meta, cache))
        y: Tensor = x + self.ffn_norm(self.ffn(x.to(dtype)))
        return y


class Setting2Block(nn.Module):
    """x + attention(norm1(x)), then x + ffn(norm2(x))."""

    def __init__(self, config: LPAConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.eps)
        self.ffn = SwiGLU(config, layer)

    def forward(
        self, x: Tensor, rotary: RotaryEmbedding | None, meta: AttentionMetadata | None, cache: LatentCache | None
    ) -> Tensor:
        """x [..., d] float32 -> [..., d] float32."""
        x = x + self.attention(self.attention_norm(x), rotary, meta, cache)
        y: Tensor = x + self.ffn(self.ffn_norm(x))
        return y


class LPAForCausalLM(nn.Module):
    """Token ids to hidden states, and hidden states to logits where they are wanted."""

    def __init__(self, config: LPAConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.architecture == "setting1":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.rotary = None
            self.norm = None
        else:
            self.rotary = RotaryEmbedding(config)
            self.norm = RMSNorm(config.hidden_size, config.eps)
        block = Setting1Block if config.architecture == "setting1" else Setting2Block
        self.layers = nn.ModuleList(block(config, layer) for layer in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.fused: FusedStep | None = None  # set by `prepare_for_inference`: all of the layers, and the head
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor, meta: AttentionMetadata | None = None, cache: LatentCache | None = None) -> Tensor:
        """Hidden states before the output head.

        Args:
            ids: int64 [rows] of a flat batch laid out by `meta`, or [batch, T] without one: the plain causal
                forward without a cache, which training uses and every other path is tested against.
            meta: where each row stands.
            cache: the pools that `meta` points into.

        Returns:
            [..., d]; in the weights' dtype in setting 2 (the final norm's output), float32 in setting 1.
        """
        x: Tensor = self.embed_tokens(ids).float()
        if self.rotary is None:
            positions = torch.arange(ids.shape[-1], device=ids.device) if meta is None else meta.positions
            x = x + self.embed_positions(positions).float()
        if self.fused is not None:
            assert meta is not None and cache is self.fused.cache, "the model is prepared for steps over its own cache"
            return self.fused(x[: meta.num_rows], meta)
        for layer in self.layers:
            x = layer(x, self.rotary, meta, cache)
        return x if self.norm is None else self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> float32 [..., vocab]; the product itself runs in the head's dtype."""
        return self.head(hidden).float()

    def head(self, hidden: Tensor) -> Tensor:
        """`logits` as the product leaves them, in the head's dtype: whoever reads them makes them float32 first."""
        hidden = hidden.to(self.embed_tokens.weight.dtype)
        if self.fused is not None:
            return self.fused.head(hidden)
        y: Tensor = self.lm_head(hidden)
        return y
