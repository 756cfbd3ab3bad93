"""Export to dense LLaMA: every low-rank pair becomes the product of its two matrices.

What is written is an ordinary LlamaForCausalLM folder, or Qwen3ForCausalLM (LLaMA with `qk_norm`), so any server of
dense models can run the model, without what its structure saves.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from lpa_model.checkpoint import (
    check_unquantized,
    load_config,
    load_model,
    load_tokenizer,
    load_tokenizer_config,
    write_weights,
)
from lpa_model.config import ATTENTION_PROJECTIONS, LPAConfig
from lpa_model.folder import CheckpointError
from lpa_model.layers import LowRankLinear
from lpa_model.model import LPAForCausalLM, PreNormBlock

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"


def export_llama(source: Path, folder: Path, dtype: torch.dtype) -> int:
    """Write the model folder `source` as LLaMA into `folder`, weights in `dtype`; returns the number of parameters.

    Products are taken in float64 and rounded once, so float32 logits agree to rounding. The tokenizer, a chat
    template and the ids of special tokens come along.

    Raises:
        CheckpointError: the source cannot be read, or LLaMA cannot express it; the message says what.
    """
    config = load_config(source)
    if reason := inexpressible(config):
        raise CheckpointError(f"{source}: {reason}")
    check_unquantized(source, "export")
    tokenizer = load_tokenizer(source)
    load_tokenizer_config(source)  # a broken file is an error before anything is written
    model = load_model(source, torch.float32, torch.device("cpu"))
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in llama_tensors(model).items()}

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**llama_config(config, dtype), **_special_ids(config)})
    write_tokenizer(folder, source, config, tokenizer)
    write_weights(folder / "model.safetensors", tensors)
    return sum(tensor.numel() for tensor in tensors.values())


def write_tokenizer(folder: Path, source: Path, config: LPAConfig, tokenizer: Tokenizer) -> None:
    """The tokenizer, a chat template and the ids of special tokens of `source`, as transformers reads them."""
    write_json(folder / "generation_config.json", _special_ids(config))
    given = load_tokenizer_config(source)
    write_json(folder / TOKENIZER_CONFIG, _tokenizer_config(given, config, tokenizer))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    if (source / CHAT_TEMPLATE).is_file():
        shutil.copyfile(source / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)


def _special_ids(config: LPAConfig) -> dict[str, Any]:
    return {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}


def inexpressible(config: LPAConfig) -> str | None:
    """Why LLaMA cannot compute what this model computes; None if it can."""
    if config.architecture == "setting1":
        return "setting 1 has learned positions, norms after its branches and biases, which LLaMA has not"
    if config.lm_head_bias:
        return "lm_head_bias: the output head has a bias, which LLaMA's has not"
    return None


def llama_config(config: LPAConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a Llama- or Qwen3ForCausalLM, in the keys that every reader's version knows."""
    scaling = None
    if config.rope_scaling is not None:
        scaling = {key: value for key, value in config.rope_scaling.items() if key != "type"}
        scaling["rope_type"] = config.rope_scaling.get("rope_type", config.rope_scaling.get("type"))
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": config.attention_bias,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def llama_tensors(model: LPAForCausalLM) -> dict[str, Tensor]:
    """LLaMA's (Qwen3's) tensors by name: merged ones in float64, the others as they are. A tied head is left out."""
    config = model.config
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": model.embed_tokens.weight}
    for i, block in enumerate(model.layers):
        assert isinstance(block, PreNormBlock), "setting 1 was refused"
        prefix = f"model.layers.{i}"
        for name in ATTENTION_PROJECTIONS:
            weight, bias = _merge(getattr(block.attention, f"{name}_proj"))
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = weight
            if config.attention_bias:  # LLaMA has it on all four or none; ours is not on the output
                tensors[f"{prefix}.self_attn.{name}_proj.bias"] = (
                    weight.new_zeros(len(weight)) if bias is None else bias
                )
        for part in ("gate", "up", "down"):
            tensors[f"{prefix}.mlp.{part}_proj.weight"], _ = _merge(getattr(block.ffn, f"{part}_proj"))
        for which, norm in (("q", block.attention.q_norm), ("k", block.attention.k_norm)):
            if norm is not None:
                tensors[f"{prefix}.self_attn.{which}_norm.weight"] = norm.weight
        tensors[f"{prefix}.input_layernorm.weight"] = block.attention_norm.weight
        tensors[f"{prefix}.post_attention_layernorm.weight"] = block.ffn_norm.weight
    assert model.norm is not None, "setting 2 has a final norm"
    tensors["model.norm.weight"] = model.norm.weight
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.lm_head.weight
    return tensors


def _merge(layer: nn.Linear | LowRankLinear) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of the dense layer that computes the same."""
    if isinstance(layer, nn.Linear):
        return layer.weight, layer.bias
    return layer.up.weight.double() @ layer.down.weight.double(), layer.up.bias


def _tokenizer_config(given: dict[str, Any], config: LPAConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What transformers wants beside tokenizer.json; the source's own file keeps what it says, a chat template too."""
    written = {
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        **given,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, token_id in (("bos_token", config.bos_token_id), ("eos_token", next(iter(config.eos_token_ids), None))):
        if token_id is not None:
            written[name] = tokenizer.id_to_token(token_id)
    return written


def write_json(path: Path, values: dict[str, Any]) -> None:
    """An object as a JSON file."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
