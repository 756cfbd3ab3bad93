"""The LPA transformer in both published settings (lpa_model/README.md, "Both settings").

The residual stream is float32 for weights of any dtype; norms hand their result to the products in the weights'
dtype. Logits are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lpa_model.attention import Attend, Attention
from lpa_model.config import ATTENTION_PROJECTIONS, LPAConfig, Projection
from lpa_model.layers import LayerNorm, ReluFFN, RMSNorm, RotaryEmbedding, SwiGLU


def module_of(projection: Projection) -> str:
    """Where a projection stands in a block: "attention.q_proj", "ffn.down_proj"."""
    return f"{'attention' if projection in ATTENTION_PROJECTIONS else 'ffn'}.{projection}_proj"


class PostNormBlock(nn.Module):
    """x + norm1(attention(x)), then x + norm2(ffn(x)): the norm is on the branch's output."""

    def __init__(self, config: LPAConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.attention_norm = LayerNorm(config.hidden_size, config.eps)
        self.ffn = ReluFFN(config, layer)
        self.ffn_norm = LayerNorm(config.hidden_size, config.eps)

    def forward(self, x: Tensor, rotary: RotaryEmbedding | None, attend: Attend | None) -> Tensor:
        """x [..., d] float32 -> [..., d] float32."""
        dtype = self.attention_norm.weight.dtype
        x = x + self.attention_norm(self.attention(x.to(dtype), rotary, attend))
        y: Tensor = x + self.ffn_norm(self.ffn(x.to(dtype)))
        return y


class PreNormBlock(nn.Module):
    """x + attention(norm1(x)), then x + ffn(norm2(x))."""

    def __init__(self, config: LPAConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.eps)
        self.ffn = SwiGLU(config, layer)

    def forward(self, x: Tensor, rotary: RotaryEmbedding | None, attend: Attend | None) -> Tensor:
        """x [..., d] float32 -> [..., d] float32."""
        x = x + self.attention(self.attention_norm(x), rotary, attend)
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
        block = PostNormBlock if config.architecture == "setting1" else PreNormBlock
        self.layers = nn.ModuleList(block(config, layer) for layer in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        on_layer: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Hidden states before the output head.

        Args:
            ids: int64 [batch, T]: the plain causal forward without a cache, which training uses and every backend is
                tested against. With `attend`, [rows] of a flat batch.
            positions: int64 [rows] of a flat batch.
            attend: a backend's attention over its cache, for one step.
            on_layer: called with each layer's number, from 0, and its input, the residual stream [..., d].

        Returns:
            [..., d]; in the weights' dtype in setting 2 (the final norm's output), float32 in setting 1.
        """
        x: Tensor = self.embed_tokens(ids).float()
        if self.rotary is None:
            if positions is None:
                positions = torch.arange(ids.shape[-1], device=ids.device)
            x = x + self.embed_positions(positions).float()
        for number, layer in enumerate(self.layers):
            if on_layer is not None:
                on_layer(number, x)
            x = layer(x, self.rotary, attend)
        return x if self.norm is None else self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> float32 [..., vocab]; the product itself runs in the head's dtype."""
        return self.head(hidden).float()

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> [..., vocab] in the head's dtype, before logits become float32."""
        y: Tensor = self.lm_head(hidden.to(self.embed_tokens.weight.dtype))
        return y


class _LeftEmpty(TorchFunctionMode):
    """Modules leave their tensors as they are: to draw numbers for them would import half of torch's compiler."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def without_weights(config: LPAConfig) -> LPAForCausalLM:
    """A model whose tensors are on the device `meta`: they have shapes, and no numbers yet."""
    with torch.device("meta"), _LeftEmpty():
        return LPAForCausalLM(config)
