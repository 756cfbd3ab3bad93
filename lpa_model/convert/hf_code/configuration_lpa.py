"""The config of an LPA model for transformers (5 or newer); the model is in modeling_lpa.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

ATTENTION = ("q", "k", "v", "o")


class LPAConfig(PretrainedConfig):
    """Sizes, ranks and architecture.

    `setting1`: learned positions, LayerNorm on the branch's output, ReLU feed-forward layers, biases.
    `setting2`: LLaMA's architecture: rotary positions, RMSNorm before the branch, SwiGLU.

    `attention_rank` (q, k, v, o) and `ffn_rank` (gate, up, down) are null for dense matrices, a rank for all of them,
    or an object with a rank, null or a list of those for every layer.
    """

    model_type = "lpa"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers declares it so)

    def __init__(
        self,
        architecture: str | None = None,
        vocab_size: int | None = None,
        hidden_size: int | None = None,
        intermediate_size: int | None = None,
        num_hidden_layers: int | None = None,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int | None = None,
        attention_rank: Any = None,
        ffn_rank: Any = None,
        attention_bias: bool = False,
        qk_norm: bool = False,
        lm_head_bias: bool = False,
        tie_word_embeddings: bool = False,
        rope_parameters: Mapping[str, Any] | None = None,
        norm_eps: float | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.architecture = architecture
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.attention_rank = attention_rank
        self.ffn_rank = ffn_rank
        self.attention_bias = attention_bias
        self.qk_norm = qk_norm
        self.lm_head_bias = lm_head_bias
        if architecture == "setting2":
            self.rope_parameters = dict(rope_parameters or {"rope_type": "default", "rope_theta": 10000.0})
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id

    def rank(self, projection: str, layer: int) -> int | None:
        """Of one matrix; None is dense."""
        spec = self.attention_rank if projection in ATTENTION else self.ffn_rank
        ranks = spec[projection] if isinstance(spec, Mapping) else spec
        found: int | None = ranks[layer] if isinstance(ranks, (list, tuple)) else ranks
        return found
