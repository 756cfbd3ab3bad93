"""LLaMA, Mistral, Qwen2 and Qwen3 written down a second time: float64, a head and a position at a time, from tensors
under Hugging Face's names and a config.json of theirs. And tiny random folders of each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny import VOCAB_SIZE, byte_tokenizer

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, Llama 3 scaling": {"tie_word_embeddings": True, "rope_scaling": LLAMA3},
    "llama, biases, linear scaling": {"attention_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "mistral": {"model_type": "mistral", "sliding_window": 64},
    "qwen2, yarn": {"model_type": "qwen2", "rope_scaling": YARN, "use_sliding_window": False, "sliding_window": 8},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True},
    "qwen3, yarn": {
        "model_type": "qwen3",
        "rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.3},
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 1], "rope_theta": 2e6},
}


def tensors_of(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random float32 tensors of a config, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    d, f, dh = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], d),
        "model.norm.weight": (d,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    widths = {"q": heads * dh, "k": kv_heads * dh, "v": kv_heads * dh}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, width in widths.items():
            shapes[f"{at}self_attn.{name}_proj.weight"] = (width, d)
            if config["model_type"] == "qwen2" or config.get("attention_bias"):
                shapes[f"{at}self_attn.{name}_proj.bias"] = (width,)
        if config["model_type"] == "qwen3":
            shapes |= {f"{at}self_attn.{name}_norm.weight": (dh,) for name in "qk"}
        shapes[f"{at}self_attn.o_proj.weight"] = (d, heads * dh)
        shapes |= {f"{at}mlp.{name}_proj.weight": (f, d) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (d, f)
        shapes |= {f"{at}{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    scale = {name: 1.0 if "embed" in name else 0.2 for name in shapes}
    return {
        name: torch.randn(shape, generator=generator) * scale[name] + ("norm.weight" in name)
        for name, shape in shapes.items()
    }


def write_folder(folder: Path, config: dict[str, Any], shards: int = 1) -> dict[str, Tensor]:
    """A Hugging Face folder of a random model in `shards` files, with the byte tokenizer; returns the tensors."""
    folder.mkdir(parents=True)
    tensors = tensors_of(config)
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    index = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for i, key in enumerate(sorted(tensors)) if i % shards == shard}
        save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tensors


def logits_of(config: dict[str, Any], tensors: dict[str, Tensor], ids: list[int]) -> Tensor:
    """float64 [T, vocab]."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    dh, eps = config["head_dim"], config["rms_norm_eps"]
    share = config["num_attention_heads"] // config["num_key_value_heads"]
    rotate, length = rotation(config)
    x = weights["model.embed_tokens.weight"][ids]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(())).double()

    def turned(x: Tensor, t: int) -> Tensor:
        """One head's vector at position t."""
        out = torch.empty_like(x)
        for i, frequency in enumerate(rotate):
            c, s = math.cos(t * frequency) * length, math.sin(t * frequency) * length
            a, b = x[i], x[i + dh // 2]
            out[i], out[i + dh // 2] = a * c - b * s, b * c + a * s
        return out

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        y = norm(x, f"{at}input_layernorm")
        q, k, v = (linear(y, f"{at}self_attn.{name}_proj").split(dh, -1) for name in "qkv")
        heads = []
        for head, query in enumerate(q):
            key, value = k[head // share], v[head // share]
            if config["model_type"] == "qwen3":
                query, key = norm(query, f"{at}self_attn.q_norm"), norm(key, f"{at}self_attn.k_norm")
            query, key = (torch.stack([turned(row, t) for t, row in enumerate(z)]) for z in (query, key))
            rows = [torch.softmax(key[: t + 1] @ query[t] / math.sqrt(dh), 0) @ value[: t + 1] for t in range(len(ids))]
            heads.append(torch.stack(rows))
        x = x + linear(torch.cat(heads, -1), f"{at}self_attn.o_proj")
        y = norm(x, f"{at}post_attention_layernorm")
        gate = linear(y, f"{at}mlp.gate_proj")
        x = x + linear(gate / (1 + torch.exp(-gate)) * linear(y, f"{at}mlp.up_proj"), f"{at}mlp.down_proj")
    x = norm(x, "model.norm")
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def rotation(config: dict[str, Any]) -> tuple[list[float], float]:
    """Radians per position of each pair, and the factor of both tables, from the formulas of the papers."""
    dh, theta = config["head_dim"], config["rope_theta"]
    plain = [theta ** (-2 * i / dh) for i in range(dh // 2)]
    scaling = config.get("rope_scaling")
    if scaling is None:
        return plain, 1.0
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling["factor"]
    if kind == "linear":
        return [w / factor for w in plain], 1.0
    old = scaling["original_max_position_embeddings"]
    turns = [old * w / (2 * math.pi) for w in plain]  # of a pair within the original context
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        found = []
        for w, n in zip(plain, turns, strict=True):
            smooth = (n - low) / (high - low)
            found.append(w if n > high else w / factor if n < low else (1 - smooth) * w / factor + smooth * w)
        return found, 1.0
    assert kind == "yarn"

    def pair_that_turns(times: float) -> float:
        """The index i, not whole, at which old * theta^(-2i/dh) = 2 pi * times."""
        return dh / 2 * math.log(old / (2 * math.pi * times), theta)

    first, last = pair_that_turns(scaling.get("beta_fast", 32)), pair_that_turns(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dh - 1)
    found = []
    for i, w in enumerate(plain):
        stretched = min(max((i - first) / (last - first), 0), 1)
        found.append(w * (1 - stretched) + w / factor * stretched)
    return found, scaling.get("attention_factor", 0.1 * math.log(factor) + 1)
