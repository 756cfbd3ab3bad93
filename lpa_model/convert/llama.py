"""`lpa convert llama`: dense LLaMA folders as setting-2 models of dense matrices, which compute the same.

LLaMA is setting 2 without factors, so that every tensor is taken over as it is.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from lpa_model.checkpoint import CheckpointError, load_tokenizer, save_checkpoint
from lpa_model.config import LPAConfig
from lpa_model.convert.source import read_tensors
from lpa_model.hf_keys import LLAMA_TYPES, read_object
from lpa_model.model import LPAForCausalLM

PARTS = {
    "attention": "self_attn",
    "ffn": "mlp",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Our parts of a block, and theirs."""


def convert_llama(src: Path, dst: Path, dtype: torch.dtype) -> LPAConfig:
    """Write the LLaMA folder `src` as the native folder `dst`, which must not exist or be empty, weights in `dtype`.

    Raises:
        CheckpointError: the folder is of another architecture, or a tensor is missing, left over, not finite or of the
            wrong shape; the message names it.
    """
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"{dst}: exists already")
    config = _config(src)
    tokenizer = load_tokenizer(src)
    with torch.device("meta"):
        model = LPAForCausalLM(config)
    model.load_state_dict(_named(config, model, read_tensors(src)), strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    dst = dst.resolve()
    new = dst.with_name(f".{dst.name}.{os.getpid()}.new")
    try:
        save_checkpoint(new, model, tokenizer, dtype, tokenizer_files=src)
        new.replace(dst)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return config


def _config(src: Path) -> LPAConfig:
    path = src / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{src}: no config.json")
    try:
        values = read_object(path)
        if values.get("model_type") not in LLAMA_TYPES:
            raise ValueError(f"model_type: {values.get('model_type')!r} is none of {', '.join(LLAMA_TYPES)}")
        return LPAConfig.from_dict({**values, "architecture": "setting2", "model_type": "lpa"})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}".replace(f"{path}: {path}", str(path))) from error


def _named(config: LPAConfig, model: LPAForCausalLM, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    unused = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}  # computed, not stored
    for name, parameter in model.named_parameters():
        theirs = _their_name(name)
        if theirs not in tensors:
            raise CheckpointError(f"missing tensor {theirs}")
        tensor = tensors[theirs]
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{theirs} has shape {list(tensor.shape)}; the config asks for {list(parameter.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{theirs} holds numbers that are not finite")
        found[name] = tensor
        unused.discard(theirs)
    for name in sorted(unused):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("o_proj.bias") and not tensors[name].any():  # ours has none there
            continue
        raise CheckpointError(f"unexpected tensor {name}")
    return found


def _their_name(name: str) -> str:
    if name == "lm_head.weight":
        return name
    if not name.startswith("layers."):
        return f"model.{name}"
    _, layer, part, *rest = name.split(".")
    return ".".join(("model.layers", layer, PARTS[part], *rest))
