"""`lpa convert official`: the authors' checkpoints (LPA paper, arXiv 2411.02063) as native model folders.

Their training code saves a plain module through Hugging Face's Trainer: a folder with weights (`source` finds and reads
them) and tokenizer files, but no config.json. Sizes are read off the shapes; what shapes do not tell is
an option.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lpa_model.checkpoint import load_tokenizer_config, read_tokenizer, save_checkpoint
from lpa_model.config import ATTENTION_PROJECTIONS, FFN_PROJECTIONS, LPAConfig, Projection, Rank, RankSpec
from lpa_model.convert.source import find_weights, read_tensors, without_prefix
from lpa_model.convert.spm import read_sentencepiece
from lpa_model.convert.stream import check_free
from lpa_model.folder import CheckpointError
from lpa_model.hf_keys import read_object
from lpa_model.model import LPAForCausalLM, without_weights

EMBEDDING = "lpa.token_embedding.weight"
POSITIONS = "lpa.positional_embedding.weight"
NORM = "lpa.norm.weight"
BLOCK = "lpa.transformer_blocks"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")

SETTING1 = {
    "embed_tokens": "lpa.token_embedding",
    "embed_positions": "lpa.positional_embedding",
    "attention.q_proj": "attention.query_proj",
    "attention.k_proj": "attention.key_proj",
    "attention.v_proj": "attention.value_proj",
    "attention.o_proj": "attention.out_proj",
    "attention_norm": "norm1",
    "ffn_norm": "norm2",
    # one nn.Sequential holds the layers and the ReLU between them
    "ffn.up_proj": "fc.0",
    "ffn.down_proj": "fc.2",
    "ffn.up_proj.down": "fc.0",
    "ffn.up_proj.up": "fc.1",
    "ffn.down_proj.down": "fc.3",
    "ffn.down_proj.up": "fc.4",
    "lm_head": "lpa.fc",
}
"""Our modules and theirs; inside a block, names are relative to it. Low-rank factors not listed are .0 and .1."""

SETTING2 = {
    "embed_tokens": "lpa.token_embedding",
    "attention.q_proj": "attention.q_proj",
    "attention.k_proj": "attention.k_proj",
    "attention.v_proj": "attention.v_proj",
    "attention.o_proj": "attention.o_proj",
    "attention_norm": "norm1",
    "ffn_norm": "norm2",
    "ffn.gate_proj": "ffn.gate_proj",
    "ffn.up_proj": "ffn.up_proj",
    "ffn.down_proj": "ffn.down_proj",
    "norm": "lpa.norm",
    "lm_head": "fc",
}


def convert_official(
    src: Path,
    dst: Path,
    *,
    num_heads: int | None = None,
    rope_theta: float | None = None,
    max_position_embeddings: int | None = None,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> LPAConfig:
    """Import the checkpoint folder `src` as the native folder `dst`, with weights in `dtype`.

    Args:
        src: the authors' folder, or a file of weights; `training_args.bin` is never opened (see `source`).
        dst: must not exist, or be empty; it appears whole or not at all.
        num_heads: needed in setting 1; in setting 2 the rotary buffer tells it.
        rope_theta: needed in setting 2 if the checkpoint has no rotary buffer.
        max_position_embeddings: context in tokens; needed in setting 2, where it is stored nowhere.
        tokenizer: a tokenizer.json, or SentencePiece's tokenizer.model, to use instead of the folder's.

    Returns:
        The config that was written.

    Raises:
        CheckpointError: an option is missing or contradicts the checkpoint, or a tensor is missing, left over, not
            finite or of the wrong shape; the message names the flag or the tensor.
    """
    dst = dst.resolve()
    check_free(dst)
    words, words_folder = read_words(src, find_weights(src)[0], tokenizer)
    tensors = without_prefix(read_tensors(src), EMBEDDING)
    if POSITIONS in tensors:
        sizes = _setting1(tensors, num_heads, rope_theta, max_position_embeddings)
    elif NORM in tensors:
        sizes = _setting2(tensors, num_heads, rope_theta, max_position_embeddings)
    else:
        raise CheckpointError(
            f"{src}: neither {POSITIONS} (setting 1) nor {NORM} (setting 2) is in the checkpoint, but "
            f"{', '.join(sorted(tensors)[:3]) or 'nothing'}"
        )
    config = LPAConfig(**sizes, **_special_ids(words_folder, words, sizes["vocab_size"]), lm_head_bias=True)
    model = _fill(config, tensors)

    new = dst.with_name(f".{dst.name}.{os.getpid()}.new")
    try:
        save_checkpoint(new, model, words, dtype, tokenizer_files=words_folder)
        new.replace(dst)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return config


def read_words(src: Path, weights: Path, path: Path | None) -> tuple[Tokenizer, Path]:
    """The tokenizer, and the folder of its other files: that of the weights, or else the one that was named."""
    folders = [weights.parent, src if src.is_dir() else src.parent]
    if re.fullmatch(r"checkpoint-\d+|fp32", weights.parent.name):  # of a run's folder, which has the tokenizer
        folders.append(weights.parent.parent)
    folder = next((f for f in folders if any((f / name).is_file() for name in TOKENIZERS)), folders[0])
    if path is None:
        path = next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)
        if path is None:
            raise CheckpointError(f"{src}: neither {' nor '.join(TOKENIZERS)}; give one with --tokenizer")
    if path.suffix != ".model":
        return read_tokenizer(path), folder
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return read_sentencepiece(path, add_bos=load_tokenizer_config(folder).get("add_bos_token") is not False), folder


def _special_ids(src: Path, tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """bos_token_id and eos_token_id, by the names in the tokenizer's files, or else by LLaMA's names."""
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (src / file).is_file():
            try:
                found = read_object(src / file)
            except ValueError as error:
                raise CheckpointError(str(error)) from error
            names |= {key: found[key] for key in names if key in found}
    ids: dict[str, int | None] = {}
    for key, token in names.items():
        text = token.get("content") if isinstance(token, dict) else token
        token_id = tokenizer.token_to_id(text) if isinstance(text, str) else None
        ids[f"{key}_id"] = token_id if token_id is not None and token_id < vocab_size else None
    return ids


def _setting1(
    tensors: Mapping[str, Tensor], num_heads: int | None, rope_theta: float | None, max_positions: int | None
) -> dict[str, Any]:
    if rope_theta is not None:
        raise CheckpointError("--rope-theta: this is a setting-1 checkpoint, with learned positions")
    if num_heads is None:
        raise CheckpointError("--num-heads is needed: a setting-1 checkpoint does not tell its number of heads")
    vocab_size, hidden_size = _matrix(tensors, EMBEDDING)
    positions, _ = _matrix(tensors, POSITIONS)
    if max_positions not in (None, positions):
        raise CheckpointError(f"--max-position-embeddings: the checkpoint has {positions} positions")
    layers = range(_num_layers(tensors))
    attention = {
        name: [_projection(tensors, f"{BLOCK}.{layer}.{SETTING1[f'attention.{name}_proj']}")[0] for layer in layers]
        for name in ATTENTION_PROJECTIONS
    }
    ffn = [_relu_ffn(tensors, layer) for layer in layers]
    return {
        "architecture": "setting1",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": ffn[0][2],
        "ffn_rank": shortest({"up": [up for up, _, _ in ffn], "down": [down for _, down, _ in ffn]}),
        "num_hidden_layers": len(layers),
        "attention_rank": shortest(attention),
        "max_position_embeddings": positions,
        **_heads(num_heads, _projection(tensors, f"{BLOCK}.0.attention.query_proj")[1]),
    }


def _setting2(
    tensors: Mapping[str, Tensor], num_heads: int | None, rope_theta: float | None, max_positions: int | None
) -> dict[str, Any]:
    if max_positions is None:
        raise CheckpointError(
            "--max-position-embeddings is needed: a setting-2 checkpoint does not tell its context (the block size "
            "that it was trained with)"
        )
    vocab_size, hidden_size = _matrix(tensors, EMBEDDING)
    layers = _num_layers(tensors)
    _, width = _projection(tensors, f"{BLOCK}.0.attention.q_proj")
    _, ffn_width = _projection(tensors, f"{BLOCK}.0.ffn.gate_proj")

    def ranks(part: str, names: tuple[Projection, ...]) -> RankSpec:
        return shortest(
            {
                name: [_projection(tensors, f"{BLOCK}.{layer}.{part}.{name}_proj")[0] for layer in range(layers)]
                for name in names
            }
        )

    if _buffer_name(0) in tensors:
        num_heads, rope_theta = _rotary(tensors, layers, width, num_heads, rope_theta)
    for flag, value in (("--num-heads", num_heads), ("--rope-theta", rope_theta)):
        if value is None:
            raise CheckpointError(f"{flag} is needed: the checkpoint has no {_buffer_name(0)} that would tell it")
    return {
        "architecture": "setting2",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": ffn_width,
        "ffn_rank": ranks("ffn", FFN_PROJECTIONS["setting2"]),
        "num_hidden_layers": layers,
        "attention_rank": ranks("attention", ATTENTION_PROJECTIONS),
        "max_position_embeddings": max_positions,
        "rope_theta": rope_theta,
        **_heads(num_heads, width),
    }


def _matrix(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """[out, in] of a weight that has to be there."""
    if name not in tensors:
        raise CheckpointError(f"missing tensor {name}")
    if tensors[name].ndim != 2:
        raise CheckpointError(f"{name} has shape {list(tensors[name].shape)}; a matrix was expected")
    rows, columns = tensors[name].shape
    return rows, columns


def _projection(tensors: Mapping[str, Tensor], module: str) -> tuple[Rank, int]:
    """(rank, output width) of a projection."""
    dense, down, up = (f"{module}{part}.weight" for part in ("", ".0", ".1"))
    if down in tensors or up in tensors:
        return _matrix(tensors, down)[0], _matrix(tensors, up)[0]
    return None, _matrix(tensors, dense)[0]


def _relu_ffn(tensors: Mapping[str, Tensor], layer: int) -> tuple[Rank, Rank, int]:
    """(rank up, rank down, width between them) of a feed-forward layer in setting 1, both low-rank or both dense."""
    at = f"{BLOCK}.{layer}.fc"
    if any(f"{at}.{i}.weight" in tensors for i in (1, 3, 4)):
        return (
            _matrix(tensors, f"{at}.0.weight")[0],
            _matrix(tensors, f"{at}.3.weight")[0],
            _matrix(tensors, f"{at}.1.weight")[0],
        )
    return None, None, _matrix(tensors, f"{at}.0.weight")[0]


def shortest(ranks: Mapping[Projection, list[Rank]]) -> RankSpec:
    """The shortest way to write down ranks that are given per projection and layer."""
    short: dict[str, Rank | list[Rank]] = {
        name: of_layers[0] if len(set(of_layers)) == 1 else of_layers for name, of_layers in ranks.items()
    }
    first, *others = short.values()
    return short if isinstance(first, list) or any(other != first for other in others) else first


def _num_layers(tensors: Mapping[str, Tensor]) -> int:
    found = [int(match[1]) for name in tensors if (match := re.match(rf"{re.escape(BLOCK)}\.(\d+)\.", name))]
    return max(found, default=0) + 1


def _heads(num_heads: int | None, width: int) -> dict[str, int]:
    if num_heads is None or num_heads < 1 or width % num_heads:
        raise CheckpointError(f"--num-heads: {num_heads} heads do not divide the attention's width of {width}")
    return {"num_attention_heads": num_heads, "head_dim": width // num_heads}


def _buffer_name(layer: int) -> str:
    return f"{BLOCK}.{layer}.attention.rotary_emb.inv_freq"


def _rotary(
    tensors: Mapping[str, Tensor], layers: int, width: int, num_heads: int | None, rope_theta: float | None
) -> tuple[int, float]:
    """(heads, theta) from the rotary buffers, which the options must not contradict."""
    first = tensors[_buffer_name(0)]
    for name in map(_buffer_name, range(layers)):
        if name not in tensors:
            raise CheckpointError(f"missing tensor {name}")
        if not torch.equal(tensors[name], first):
            raise CheckpointError(f"{name} differs from {_buffer_name(0)}")
    theta = _theta(first)
    heads = width // (2 * len(first))
    if num_heads not in (None, heads):
        raise CheckpointError(f"--num-heads: {_buffer_name(0)} says {heads}")
    if rope_theta not in (None, theta):
        raise CheckpointError(f"--rope-theta: {_buffer_name(0)} says {theta}")
    return heads, theta


def _theta(frequencies: Tensor) -> float:
    """The base whose powers theta^(-2i/dh) the frequencies [dh/2] are, up to the rounding of their dtype."""
    if frequencies.ndim == 1 and len(frequencies):
        found = frequencies.double()
        exponents = torch.arange(len(found), dtype=torch.float64) / len(found)
        candidates = [10000.0]  # first: frequencies in bfloat16 fit many a theta
        if len(found) > 1:
            candidates.append(float(f"{float(found[-1] ** (-1 / exponents[-1])):.6g}"))
        for theta in candidates:
            if torch.allclose(theta**-exponents, found, rtol=16 * torch.finfo(frequencies.dtype).eps, atol=0):
                return theta
    raise CheckpointError(f"{_buffer_name(0)}: these are not the frequencies of plain rotary positions")


def _fill(config: LPAConfig, tensors: Mapping[str, Tensor]) -> LPAForCausalLM:
    """The model with every tensor in its place; a missing one, one left over or of another shape is an error."""
    model = without_weights(config)
    table = SETTING1 if config.architecture == "setting1" else SETTING2
    found: dict[str, Tensor] = {}
    unused = set(tensors)
    if config.rotary:
        unused -= {_buffer_name(layer) for layer in range(config.num_hidden_layers)}  # heads and theta come from them
    for name, parameter in model.named_parameters():
        theirs = _source_name(name, table)
        if theirs not in tensors:
            raise CheckpointError(f"missing tensor {theirs}")
        if tensors[theirs].shape != parameter.shape:
            raise CheckpointError(
                f"{theirs} has shape {list(tensors[theirs].shape)}; the other tensors' shapes ask for "
                f"{list(parameter.shape)}"
            )
        if not torch.isfinite(tensors[theirs]).all():
            raise CheckpointError(f"{theirs} holds numbers that are not finite")
        found[name] = tensors[theirs]
        unused.remove(theirs)
    if unused:
        raise CheckpointError(f"unknown tensor {min(unused)}" + f" and {len(unused) - 1} more" * (len(unused) > 1))
    model.load_state_dict(found, assign=True)
    return model


def _source_name(name: str, table: Mapping[str, str]) -> str:
    """Their name of one of our parameters."""
    module, kind = name.rsplit(".", 1)
    block = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    if block is None:
        return f"{table[module]}.{kind}"
    part = block[2]
    if part in table:
        return f"{BLOCK}.{block[1]}.{table[part]}.{kind}"
    part, factor = part.rsplit(".", 1)
    return f"{BLOCK}.{block[1]}.{table[part]}.{'0' if factor == 'down' else '1'}.{kind}"
