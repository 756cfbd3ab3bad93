"""`lpa convert gguf`: LLaMA-like GGUF files, llama.cpp's format, as setting-2 models of dense matrices.

Quantised tensors become float32, as llama.cpp's own Python reader dequantises them. The file has the tokenizer and the
chat template, too (`gguf_tokenizer`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lpa_model.config import LPAConfig
from lpa_model.convert.gguf_tokenizer import end_ids, read_tokenizer, special_id, tokenizer_files
from lpa_model.convert.stream import Progress, Stored, check_free, row_blocks, write_model
from lpa_model.folder import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""`general.architecture` of the files that are read. In `llama` files rows of q and k are interleaved."""

PARTS = {
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention_norm": "attn_norm",
    "ffn.gate_proj": "ffn_gate",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
    "ffn_norm": "ffn_norm",
}
WHOLE = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
OURS = {theirs: ours for ours, theirs in PARTS.items()}
ROPE_FACTORS = "rope_freqs.weight"

READ = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.sliding_window"),
    *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scale_linear"),
)
"""Keys `ARCHITECTURE.` that are understood."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (1.0,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
    "tensor_data_layout": ("Meta AI original pth",),
}
"""Keys of variants, and the values at which they have no effect."""


def convert_gguf(src: Path, dst: Path, dtype: torch.dtype | None = None, progress: Progress | None = None) -> LPAConfig:
    """Write a GGUF file, or all files of a split one by any of them, as the native folder `dst`.

    Args:
        dst: must not exist, or be empty; it appears whole or not at all.
        dtype: of the weights; None keeps float32, float16 and bfloat16, and makes float32 of quantised ones.

    Raises:
        CheckpointError: the extra is not installed, the file is truncated, of another architecture or with a tokenizer
            or a quantisation that is not supported, or a tensor is missing, left over, of the wrong shape or not
            finite; the message names it.
    """
    check_free(dst)
    readers = _open(src)
    values = _Values(src, readers[0])
    architecture = values.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{src}: general.architecture {architecture!r} is not supported ({', '.join(ARCHITECTURES)} are)"
        )
    found = _tensors(readers)
    config = _config(src, values, architecture, found)
    tensors = _named(src, config, architecture, found)
    tokenizer = read_tokenizer(src, values.contents)
    write_model(
        dst,
        config,
        tensors,
        tokenizer,
        tokenizer_files(src, values.contents, tokenizer, config),
        dtype=dtype,
        progress=progress,
    )
    return config


def _open(src: Path) -> list[tuple[Path, GGUFReader]]:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(
            f"{src}: GGUF; `pip install 'lpa-server[gguf]'` installs llama.cpp's reader of it ({error})"
        ) from error
    split = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", src.name)
    count = int(split[2]) if split else 1
    paths = [src.with_name(f"{split[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)] if split else [src]
    readers = []
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        try:
            reader = GGUFReader(path)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from error
        except Exception as error:  # IndexError, ValueError, KeyError, UnicodeDecodeError, MemoryError, ...
            if unknown := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error)):
                raise CheckpointError(f"{path}: quantisation type {unknown[1]} is none that the reader has") from error
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path}: truncated or not a GGUF file ({reason})") from error
        if reader.byte_order != "I":
            raise CheckpointError(f"{path}: its byte order is not this machine's")
        readers.append((path, reader))
    return readers


class _Values:
    """The file's metadata by key, of a given type."""

    def __init__(self, path: Path, opened: tuple[Path, GGUFReader]) -> None:
        self.path = path
        self._fields = opened[1].fields
        self._found: dict[str, Any] = {}

    def contents(self, key: str) -> Any:
        """None for a key that is not there."""
        if key not in self._found:
            field = self._fields.get(key)
            self._found[key] = None if field is None else field.contents()
        return self._found[key]

    def names(self) -> list[str]:
        return list(self._fields)

    def text(self, key: str) -> str:
        if not isinstance(value := self.contents(key), str):
            raise CheckpointError(f"{self.path}: {key} {value!r} is no text")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The number that float32 was made of: 1e-05, not 9.99999974e-06."""
        value = self.contents(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.path}: {key} {value!r} is no number")
        return float(str(np.float32(value)))

    def integer(self, key: str, default: int | None = None) -> int:
        """One number, or a list of one per layer that are all the same."""
        value = self.contents(key)
        if value is None and default is not None:
            return default
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if type(value) is not int:
            raise CheckpointError(f"{self.path}: {key} {value!r} is not one whole number")
        return value


def _tensors(readers: list[tuple[Path, GGUFReader]]) -> dict[str, tuple[Path, ReaderTensor]]:
    found: dict[str, tuple[Path, ReaderTensor]] = {}
    for path, reader in readers:
        for tensor in reader.tensors:
            if tensor.name in found:
                raise CheckpointError(f"{path}: {tensor.name} is there twice")
            found[tensor.name] = path, tensor
    return found


def _config(src: Path, values: _Values, architecture: str, found: Mapping[str, tuple[Path, ReaderTensor]]) -> LPAConfig:
    at = f"{architecture}."
    for key in values.names():
        name = key.removeprefix(at)
        if name == key or name in READ:
            continue
        if (value := values.contents(key)) not in NEUTRAL.get(name, ()):
            raise CheckpointError(f"{src}: {key} {value!r} is not supported; LPA models have nothing of the kind")
    context = values.integer(f"{at}context_length")
    if 0 < (window := values.integer(f"{at}attention.sliding_window", 0)) < context:
        raise CheckpointError(
            f"{src}: {at}attention.sliding_window {window} is shorter than the context of {context} tokens, and "
            "attention over a window is not supported"
        )
    heads, width = values.integer(f"{at}attention.head_count"), values.integer(f"{at}embedding_length")
    head_dim = values.integer(f"{at}attention.key_length", width // max(1, heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if (value := values.integer(f"{at}{name}", head_dim)) != head_dim:
            raise CheckpointError(f"{src}: {at}{name} {value} is not the {head_dim} of a head's keys")
    if "token_embd.weight" not in found:
        raise CheckpointError(f"{src}: missing tensor token_embd.weight")
    theta = values.number(f"{at}rope.freq_base", 10000.0)
    scaling = _scaling(src, values, at, context)
    if ROPE_FACTORS in found:
        path, tensor = found[ROPE_FACTORS]
        if scaling is not None:
            raise CheckpointError(f"{src}: {ROPE_FACTORS} and {at}rope.scaling.type are two scalings of one model")
        scaling = llama3_scaling(path, torch.cat(list(_parts(path, tensor))), theta)
    try:
        return LPAConfig(
            architecture="setting2",
            vocab_size=int(found["token_embd.weight"][1].shape[-1]),
            hidden_size=width,
            intermediate_size=values.integer(f"{at}feed_forward_length"),
            num_hidden_layers=values.integer(f"{at}block_count"),
            num_attention_heads=heads,
            num_key_value_heads=values.integer(f"{at}attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=context,
            attention_bias=f"blk.0.{PARTS['attention.q_proj']}.bias" in found,
            qk_norm=architecture == "qwen3",
            tie_word_embeddings="output.weight" not in found,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=values.number(f"{at}attention.layer_norm_rms_epsilon"),
            bos_token_id=special_id(src, values.contents, "bos"),
            eos_token_id=end_ids(src, values.contents) or None,
        )
    except ValueError as error:
        raise CheckpointError(f"{src}: {error}") from error


def _scaling(src: Path, values: _Values, at: str, context: int) -> dict[str, Any] | None:
    """`rope_scaling` of the keys `rope.scaling.`."""
    kind = values.contents(f"{at}rope.scaling.type")
    old = values.number(f"{at}rope.scale_linear", 1.0)
    if kind in (None, "none"):
        return None if old == 1 else {"rope_type": "linear", "factor": old}
    factor = values.number(f"{at}rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": values.integer(f"{at}rope.scaling.original_context_length", context),
            "beta_fast": values.number(f"{at}rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": values.number(f"{at}rope.scaling.yarn_beta_slow", 1.0),
        }
        if (attention := values.number(f"{at}rope.scaling.attn_factor", 1.0)) != 1:  # times what the factor makes
            scaling["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
        return scaling
    raise CheckpointError(f"{src}: {at}rope.scaling.type {kind!r} is not supported (none, linear, yarn are)")


def llama3_scaling(path: Path, factors: Tensor, theta: float) -> dict[str, Any] | None:
    """The `rope_scaling` of type llama3 by which frequency i of `factors` [dh/2] is divided; None if all are 1.

    Which is in them is the largest factor F and, for those between 1 and F, a line: 1 / factor = s + (1 - s) / F with
    s = (L / wavelength - low) / (high - low). Low, high and L matter by their ratios alone; low is 1.

    Raises:
        CheckpointError: no parameters make these factors.
    """
    given = factors.double().reshape(-1)
    if bool((given == 1).all()):
        return None
    count = len(given)
    wavelengths = 2 * math.pi * theta ** (torch.arange(count, dtype=torch.float64) / count)
    factor = round(float(given.max()), 4)
    candidates = [(float(2**k), 4.0) for k in range(6, 21)]  # as published: low 1, high 4
    between = (given > 1 + 1e-3) & (given < factor * (1 - 1e-3))
    if int(between.sum()) > 1:
        smooth = (1 / given[between] - 1 / factor) / (1 - 1 / factor)
        points = torch.stack((1 / wavelengths[between], torch.ones_like(smooth)), 1)
        slope, offset = torch.linalg.lstsq(points, smooth).solution.tolist()
        if slope > 0 > offset:
            candidates.append((float(round(slope / -offset)), round(1 - 1 / offset, 3)))
    for original, high in candidates:
        keep = ((original / wavelengths - 1) / (high - 1)).clamp(0, 1)
        if torch.allclose(1 / (keep + (1 - keep) / factor), given, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(original),
            }
    raise CheckpointError(f"{path}: {ROPE_FACTORS} has factors that are none of Llama 3's scaling")


def _named(
    src: Path, config: LPAConfig, architecture: str, found: Mapping[str, tuple[Path, ReaderTensor]]
) -> dict[str, Stored]:
    """Our names of the file's tensors; one that has none is an error."""
    named = {}
    for name, (path, tensor) in found.items():
        if name == ROPE_FACTORS:
            continue
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
        if block and block[2] == "attn_output" and kind == "bias":  # ours has none there
            if all(not part.any() for part in _parts(path, tensor)):
                continue
            raise CheckpointError(f"{path}: {name} is not zero, and LPA models have no bias there")
        if block and block[2] in OURS:
            ours = f"layers.{block[1]}.{OURS[block[2]]}.{kind}"
        elif module in WHOLE:
            ours = f"{WHOLE[module]}.{kind}"
        else:
            raise CheckpointError(f"{path}: unexpected tensor {name} ({architecture})")
        heads = None
        if architecture == "llama" and block and block[2] in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if block[2] == "attn_q" else config.kv_heads
        named[ours] = _stored(path, tensor, heads)
    return named


def _stored(path: Path, tensor: ReaderTensor, heads: int | None) -> Stored:
    """A tensor as it is read; with `heads`, its rows in the order of LLaMA's rotate-half."""
    from gguf import GGMLQuantizationType as Kind

    shape = tuple(int(size) for size in reversed(tensor.shape))
    dtype = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(tensor.tensor_type, torch.float32)

    def parts() -> Iterator[Tensor]:
        if heads is None:
            yield from _parts(path, tensor)
            return
        rows = torch.cat(list(_parts(path, tensor)))
        if shape[0] % (2 * heads):
            raise CheckpointError(f"{path}: {tensor.name} has {shape[0]} rows, which {heads} heads do not divide")
        # llama.cpp rotates neighbours: row 2i + j of a head is row i + j·dh/2 of LLaMA's
        yield rows.reshape(heads, shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(shape)

    return Stored(path, tensor.name, shape, dtype, parts)


def _parts(path: Path, tensor: ReaderTensor) -> Iterator[Tensor]:
    """Blocks of rows: float16 and bfloat16 as they are, the rest as float32."""
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import dequantize

    shape = tuple(int(size) for size in reversed(tensor.shape))
    integers = (Kind.I8, Kind.I16, Kind.I32, Kind.I64)
    if tensor.tensor_type in integers:
        raise CheckpointError(f"{path}: {tensor.name} holds whole numbers ({tensor.tensor_type.name})")
    for rows in row_blocks(shape):
        data = tensor.data[rows]
        size = (rows.stop - rows.start, *shape[1:])
        if tensor.tensor_type == Kind.BF16:
            yield torch.from_numpy(np.array(data).view(np.int16)).view(torch.bfloat16).reshape(size)
        elif tensor.tensor_type == Kind.F16:
            yield torch.from_numpy(np.array(data)).reshape(size)
        elif tensor.tensor_type == Kind.F64:
            yield torch.from_numpy(data.astype(np.float32)).reshape(size)
        else:
            try:
                found = dequantize(data, tensor.tensor_type)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{path}: {tensor.name} is quantised as {tensor.tensor_type.name}, which the reader cannot undo"
                ) from error
            yield torch.from_numpy(np.array(found, np.float32)).reshape(size)
