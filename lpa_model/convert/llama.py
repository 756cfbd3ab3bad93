"""`lpa convert llama`: dense folders of the LLaMA family as setting-2 models of dense matrices, which compute the same.

LLaMA is setting 2 without factors, so that every tensor is taken over as it is. Mistral, Qwen2 (biases on q, k and v),
Qwen3 (norms of queries and keys) and SmolLM are, too, as far as their configs ask for nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from lpa_model.checkpoint import TOKENIZER_FILES, load_tokenizer, load_tokenizer_config, read_optional
from lpa_model.config import LPAConfig
from lpa_model.convert.source import stored_tensors
from lpa_model.convert.spm import read_sentencepiece
from lpa_model.convert.stream import Progress, Stored, check_free, write_model
from lpa_model.folder import CheckpointError
from lpa_model.hf_keys import LLAMA_TYPES

PARTS = {
    "attention": "self_attn",
    "ffn": "mlp",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Our parts of a block, and theirs."""
OURS = {theirs: ours for ours, theirs in PARTS.items()}

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "smollm3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}
"""What the absence of a key means in transformers' configs of each type, where it means something else here."""

NEUTRAL = {"is_llama_config": (True,), "rope_interleaved": (False,), "use_mrope": (False,)}
"""Keys of their variants, and the values at which they have no effect."""
IGNORED = ("transformers.js_config", "unsloth_fixed", "max_length", "no_rope_layer_interval")
"""Keys that change no result, or that another key says."""


def convert_llama(
    src: Path, dst: Path, dtype: torch.dtype | None = None, progress: Progress | None = None
) -> LPAConfig:
    """Write the Hugging Face folder `src` as the native folder `dst`, which must not exist or be empty.

    Args:
        dtype: of the weights; None keeps that of each tensor.

    Raises:
        CheckpointError: the folder is of another architecture or asks for what LPA models do not have, its tokenizer is
            missing or another model's, or a tensor is missing, left over, not finite or of the wrong shape; the message
            names it.
    """
    check_free(dst)
    path = src / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{src}: no config.json")
    try:
        config = config_of(read_optional(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}".replace(f"{path}: {path}", str(path))) from error
    tokenizer = _tokenizer(src)
    tensors = _named(config, stored_tensors(src))
    files = {name: src / name for name in TOKENIZER_FILES}
    texts = {name: file.read_text(encoding="utf-8-sig") for name, file in files.items() if file.is_file()}
    write_model(dst, config, tensors, tokenizer, texts, dtype=dtype, progress=progress)
    return config


def config_of(values: Mapping[str, Any]) -> LPAConfig:
    """The LPA config that computes what a config.json of LLAMA_TYPES describes.

    Raises:
        ValueError: it is of another type, or asks for what LPA models do not have; the message names the key.
    """
    kind = values.get("model_type")
    if kind not in LLAMA_TYPES:
        raise ValueError(f"model_type: {kind!r} is none of {', '.join(LLAMA_TYPES)}")
    found = {name: value for name, value in {**DEFAULTS[kind], **values}.items() if name not in IGNORED}
    for name, allowed in NEUTRAL.items():
        if name in found and (value := found.pop(name)) not in allowed:
            raise ValueError(f"{name}: {value!r} is not supported")
    _check_layers(kind, found)
    if kind == "qwen2":
        found["attention_bias"] = True  # on q, k and v, even if the config says otherwise
    found["qk_norm"] = kind == "qwen3"
    for name in ("bos_token_id", "eos_token_id"):
        if name not in values and isinstance(size := found.get("vocab_size"), int) and found.get(name, 0) >= size:
            del found[name]
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(found.get(name), Mapping):
            found[name] = _with_lengths(found[name], found["max_position_embeddings"])
    return LPAConfig.from_dict({**found, "architecture": "setting2", "model_type": "lpa"})


def _check_layers(kind: str, found: dict[str, Any]) -> None:
    """Refuse attention over a window and layers without positions, and drop the keys that say that there is none."""
    layers, context = found.get("num_hidden_layers"), found["max_position_embeddings"]
    window = found.pop("sliding_window", None)
    used = found.pop("use_sliding_window", kind in ("llama", "mistral"))
    first = found.pop("max_window_layers", 28 if kind in ("qwen2", "qwen3") else 0)
    types = found.pop("layer_types", None)
    if types is not None:
        used = any(one != "full_attention" for one in types)
        if others := sorted({str(one) for one in types} - {"full_attention", "sliding_attention"}):
            raise ValueError(f"layer_types: {others[0]} is not supported")
    elif isinstance(layers, int) and isinstance(first, int) and first >= layers:
        used = False
    if used and window is not None and not (isinstance(window, int) and isinstance(context, int) and window >= context):
        raise ValueError(
            f"sliding_window: {window!r} is shorter than the context (max_position_embeddings {context}), and "
            "attention over a window is not supported"
        )
    positions = found.pop("no_rope_layers", None)
    if kind == "smollm3" and (positions is None or not all(positions)):
        raise ValueError("no_rope_layers: layers without rotary positions are not supported")


def _with_lengths(scaling: Mapping[str, Any], context: int) -> dict[str, Any]:
    """A scaling with the lengths and the factor that follow where it does not say them."""
    full = dict(scaling)
    if full.get("rope_type", full.get("type")) in ("llama3", "yarn"):
        full.setdefault("original_max_position_embeddings", context)
        if full.get("factor") is None and isinstance(original := full["original_max_position_embeddings"], int):
            full["factor"] = context / original
    return full


def _tokenizer(src: Path) -> Tokenizer:
    """The folder's tokenizer.json, or else its SentencePiece tokenizer.model."""
    if (src / "tokenizer.json").is_file() or not (src / "tokenizer.model").is_file():
        return load_tokenizer(src)
    add_bos = load_tokenizer_config(src).get("add_bos_token") is not False
    return read_sentencepiece(src / "tokenizer.model", add_bos=add_bos)


def _named(config: LPAConfig, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Our names of their tensors, without those that ours computes or has twice."""
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if name.endswith("o_proj.bias"):  # ours has none there
            if any(part.any() for part in tensor.parts()):
                raise CheckpointError(f"{tensor.file}: {name} is not zero, and LPA models have no bias there")
            continue
        if (ours := _our_name(name)) is None:
            raise CheckpointError(f"{tensor.file}: unexpected tensor {name}")
        found[ours] = tensor
    return found


def _our_name(name: str) -> str | None:
    if name == "lm_head.weight":
        return name
    module, _, rest = name.partition(".")
    if module != "model":
        return None
    if not rest.startswith("layers."):
        return rest
    parts = rest.split(".")
    if len(parts) < 4 or parts[2] not in OURS:
        return None
    return ".".join((*parts[:2], OURS[parts[2]], *parts[3:]))
