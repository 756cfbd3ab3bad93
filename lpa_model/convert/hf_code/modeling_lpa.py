"""LPA models for transformers (5 or newer): matrices stay in their two factors, for inference and for training.

The cache holds keys and values of all heads, as transformers' caches do; lpa-server caches latents.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_lpa import LPAConfig

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of transformers calls a cache."""
MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)


class LowRankLinear(nn.Module):
    """y = up(down(x)): weights [rank, in] and [out, rank]."""

    def __init__(self, width_in: int, width_out: int, rank: int, bias_down: bool, bias_up: bool) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=bias_down)
        self.up = nn.Linear(rank, width_out, bias=bias_up)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        return y


def projection(config: LPAConfig, name: str, layer: int) -> nn.Module:
    """A matrix in factors or dense, with the biases of its architecture."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    width, inner = config.hidden_size, config.intermediate_size
    sizes = {"q": (width, queries), "k": (width, keys), "v": (width, keys), "o": (queries, width)}
    sizes |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    one, into_stream = config.architecture == "setting1", name in ("o", "down")
    bias = config.attention_bias and name in ("q", "k", "v")
    if (rank := config.rank(name, layer)) is None:
        return nn.Linear(*sizes[name], bias=one or bias)
    return LowRankLinear(*sizes[name], rank, one and not into_stream, (one and into_stream) or bias)


class RootMeanSquare(nn.Module):
    """x / rms(x) * weight, computed in float32, in the weight's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x.to(self.weight.dtype) * self.weight


class StreamNorm(nn.Module):
    """LayerNorm computed and returned in float32, which the residual stream is."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)


class Rotary(nn.Module):
    """Rotary positions, scaled as the config says."""

    inv_freq: Tensor

    def __init__(self, config: LPAConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", torch.empty(config.head_dim // 2, dtype=torch.float32), persistent=False)
        self.length = 1.0
        self.fill()

    def fill(self) -> None:
        """Compute the frequencies [dh/2], which no checkpoint has, in place."""
        parameters, width = self.config.rope_parameters, self.config.head_dim
        with torch.device("cpu"), torch.no_grad():  # models are made on the meta device, where nothing is computed
            if parameters["rope_type"] == "default":
                exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
                frequencies = parameters["rope_theta"] ** -exponents
            else:
                frequencies, self.length = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](self.config)
            self.inv_freq.copy_(frequencies)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [batch, T] -> cos and sin [batch, 1, T, dh/2], float32."""
        if self.inv_freq.dtype != torch.float32:  # model.half() casts buffers
            self.inv_freq = torch.empty_like(self.inv_freq, dtype=torch.float32)
            self.fill()
        angles = (positions[..., None].float() * self.inv_freq).unsqueeze(1)
        return angles.cos() * self.length, angles.sin() * self.length


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, heads, T, dh]: dimension i with dimension i + dh/2."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention written out; the only one that returns its weights."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


class Attention(nn.Module):
    is_causal = True

    def __init__(self, config: LPAConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.q_proj = projection(config, "q", layer)
        self.k_proj = projection(config, "k", layer)
        self.v_proj = projection(config, "v", layer)
        self.o_proj = projection(config, "o", layer)
        if config.qk_norm:
            self.q_norm = RootMeanSquare(config.head_dim, config.norm_eps)
            self.k_norm = RootMeanSquare(config.head_dim, config.norm_eps)

    def forward(
        self, x: Tensor, positions: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """x [batch, T, d] -> the same shape, and the weights where the implementation returns them."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(shape), self.k_proj(x).view(shape), self.v_proj(x).view(shape)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if positions is not None:
            q, k = rotated(q, *positions), rotated(k, *positions)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = eager_attention
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        y, weights = attend(self, q, k, v, mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(y.reshape(*x.shape[:-1], -1)), weights


class ReluFFN(nn.Module):
    def __init__(self, config: LPAConfig, layer: int) -> None:
        super().__init__()
        self.up_proj = projection(config, "up", layer)
        self.down_proj = projection(config, "down", layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.relu(self.up_proj(x)))
        return y


class SwiGLU(nn.Module):
    def __init__(self, config: LPAConfig, layer: int) -> None:
        super().__init__()
        self.gate_proj = projection(config, "gate", layer)
        self.up_proj = projection(config, "up", layer)
        self.down_proj = projection(config, "down", layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class LPABlock(GradientCheckpointingLayer):
    """Norms before the branches (setting 2) or on their outputs (setting 1); x [batch, T, d] is float32."""

    def __init__(self, config: LPAConfig, layer: int) -> None:
        super().__init__()
        self.post_norm = config.architecture == "setting1"
        norm = StreamNorm if self.post_norm else RootMeanSquare
        self.attention = Attention(config, layer)
        self.attention_norm = norm(config.hidden_size, config.norm_eps)
        self.ffn = ReluFFN(config, layer) if self.post_norm else SwiGLU(config, layer)
        self.ffn_norm = norm(config.hidden_size, config.norm_eps)

    def forward(
        self, x: Tensor, positions: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        dtype = self.attention_norm.weight.dtype
        if self.post_norm:
            y, weights = self.attention(x.to(dtype), positions, mask, cache, **kwargs)
            x = x + self.attention_norm(y)
            return x + self.ffn_norm(self.ffn(x.to(dtype))), weights
        # vLLM puts its own norm here, which returns what it is given: float32
        y, weights = self.attention(self.attention_norm(x).to(dtype), positions, mask, cache, **kwargs)
        x = x + y
        return x + self.ffn(self.ffn_norm(x).to(dtype)), weights


class LPAPreTrainedModel(PreTrainedModel):
    config_class = LPAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LPABlock"]  # noqa: RUF012 (transformers declares it so)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Rotary):
            module.fill()


class LPAModel(LPAPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: LPAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.architecture == "setting1":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.rotary = None
            self.norm = None
        else:
            self.rotary = Rotary(config)
            self.norm = RootMeanSquare(config.hidden_size, config.norm_eps)
        self.layers = nn.ModuleList(LPABlock(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = DynamicCache()
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        given = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "input_embeds": inputs_embeds,  # older versions
            "attention_mask": attention_mask,
            CACHE: cache,
            "cache_position": position_ids[0],  # older versions
            "position_ids": position_ids,
        }
        mask = create_causal_mask(**{name: value for name, value in given.items() if name in MASK_ARGUMENTS})
        x = inputs_embeds.float()
        if self.rotary is None:
            x, positions = x + self.embed_positions(position_ids).float(), None
        else:
            positions = self.rotary(position_ids)
        hidden, attentions = [x], []
        for layer in self.layers:
            x, weights = layer(x, positions, mask, cache, **kwargs)
            hidden.append(x)
            attentions.append(weights)
        x = (x if self.norm is None else self.norm(x)).to(self.layers[0].attention_norm.weight.dtype)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions and attentions[0] is None:
            raise ValueError("output_attentions needs attn_implementation='eager'; the others return no weights")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*hidden[:-1], x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            **{CACHE: cache if use_cache else None},
        )


class LPAForCausalLM(LPAPreTrainedModel, GenerationMixin):
    """Token ids to logits, and to a loss with `labels`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers declares it so)

    def __init__(self, config: LPAConfig) -> None:
        super().__init__(config)
        self.model = LPAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=past_key_values if cache is None else cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = out.last_hidden_state
        logits = self.lm_head(hidden if isinstance(keep, int) else hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            **{CACHE: out.get(CACHE)},
        )
