"""The native checkpoint folder: config.json, model.safetensors (or shards with an index), tokenizer.json; beside
them, where a model has them, tokenizer_config.json, chat_template.jinja and generation_config.json as Hugging Face
writes them.

A folder may hold matrices in few bits, as `convert/quantize.py` writes it. The metadata of its model.safetensors say so
(`weights`: int8 or int4, `format_version`: 1). Instead of NAME.weight [out, in] such a matrix has NAME.codes, int8
[out, groups * 32] or uint8 [out, groups * 16], and NAME.scales, bfloat16 [out, groups]; see `quantization`.

Reading is strict: a missing, extra or wrongly shaped tensor is an error that names it. No pickle is ever opened.
"""

from __future__ import annotations

import json
import os
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from lpa_model.config import MAX_SIZE, PRESETS, LPAConfig
from lpa_model.folder import CheckpointError, weight_files
from lpa_model.hf_keys import read_object
from lpa_model.model import LPAForCausalLM, without_weights
from lpa_model.quantization import GROUP, Quantized, QuantizedLinear, WeightType, unpacked

QUANTIZATION_VERSION = 1
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)  # optional ones, kept as they are


def save_checkpoint(
    folder: Path,
    model: LPAForCausalLM,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    *,
    tokenizer_files: Path | None = None,
) -> None:
    """Write a model folder with weights in `dtype`; every file is replaced whole, so a reader never sees a half.

    What the folder `tokenizer_files` has of TOKENIZER_FILES comes along.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to(dtype).contiguous() for name, p in model.named_parameters()}
    weights = folder / "model.safetensors.new"
    write_weights(weights, tensors)
    write_texts(folder, model.config, tokenizer, tokenizer_files)
    weights.replace(folder / "model.safetensors")


def write_texts(folder: Path, config: LPAConfig, tokenizer: Tokenizer, tokenizer_files: Path | None) -> None:
    """The files beside the weights; what the folder `tokenizer_files` has of TOKENIZER_FILES comes along."""
    replace_text(folder / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
    replace_text(folder / "tokenizer.json", tokenizer.to_str())
    for source in [tokenizer_files / name for name in TOKENIZER_FILES] if tokenizer_files is not None else []:
        if source.is_file():
            replace_text(folder / source.name, source.read_text(encoding="utf-8-sig"))


def write_weights(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    """A safetensors file with the permissions of any new file: the library's 0600 a container's user cannot read."""
    path.unlink(missing_ok=True)  # of a killed process, with the library's permissions
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    path.chmod(mode)


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole: a reader never sees a half."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def load_config(folder: Path) -> LPAConfig:
    """The folder's config.json.

    Raises:
        CheckpointError: there is no such folder or file, or it does not describe a supported model.
    """
    if not folder.is_dir():
        raise CheckpointError(no_folder(str(folder)))
    if not (folder / "config.json").is_file():
        if (folder / "model" / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json; the model of this training run is {folder / 'model'}")
        raise CheckpointError(f"{folder}: no config.json; `lpa convert official` imports the authors' checkpoints")
    try:
        return LPAConfig.load(folder / "config.json")
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def no_folder(name: str) -> str:
    """What a name is that is no model folder, and what to do about it."""
    if name in PRESETS:
        return (
            f"{name}: is a preset, a shape without weights, and no model folder; `lpa init {name} FOLDER` writes a "
            f"model of random weights, `lpa train {name}` trains one" + _EMBEDDED * (name == "lpa-tiny")
        )
    if name.endswith(".gguf") and Path(name).exists():
        return f"{name}: is a GGUF file; `lpa convert gguf {name} FOLDER` makes an LPA model of it"
    if Path(name).exists():
        return f"{name}: is a file; a model is a folder with config.json, model.safetensors and tokenizer.json"
    return f"{name}: no such model folder"


_EMBEDDED = "; without a name the embedded lpa-tiny is taken"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer.json; CheckpointError when it is missing or broken."""
    return read_tokenizer(folder / "tokenizer.json")


def load_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The folder's tokenizer_config.json, {} without one; CheckpointError when it is broken."""
    return read_optional(folder / "tokenizer_config.json")


def read_optional(path: Path) -> dict[str, Any]:
    """The object of a JSON file, {} where there is no such file; CheckpointError when it is broken."""
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json under any name; CheckpointError when it is missing or broken."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        found = Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: {error}") from error
    largest = max(found.get_vocab().items(), key=itemgetter(1), default=("", 0))
    if largest[1] > MAX_SIZE:  # the library writes a tokenizer down by counting up to it
        raise CheckpointError(f"{path}: token {largest[0]!r} has the id {largest[1]}; the limit is {MAX_SIZE}")
    return found


def stored_dtypes(folder: Path) -> list[str]:
    """The dtypes of a folder's tensors, from the headers of its weight files."""
    found: set[str] = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= {str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I8": "int8", "U8": "int4"}
    return sorted(names.get(dtype, dtype) for dtype in found)


def stored_weights(folder: Path) -> WeightType | None:
    """int8 or int4 for a folder of quantised weights, None for any other.

    Raises:
        CheckpointError: there are no weights, they cannot be read, or a newer version has written them.
    """
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: truncated or not a safetensors file: {error}") from error
        if (name := metadata.get("weights")) is None:
            continue
        version = metadata.get("format_version", "")
        if not version.isdecimal() or int(version) > QUANTIZATION_VERSION:
            raise CheckpointError(
                f"{path}: format_version {version!r} of quantised weights is not one that this version reads (up to "
                f"{QUANTIZATION_VERSION})"
            )
        kinds: dict[str, WeightType] = {"int8": "int8", "int4": "int4"}
        if name not in kinds:
            raise CheckpointError(f"{path}: weights {name!r} are neither int8 nor int4")
        return kinds[name]
    return None


def check_unquantized(folder: Path, task: str) -> None:
    """Raises CheckpointError for a folder of quantised weights, where `task` (a verb) takes those that they were of."""
    if (stored := stored_weights(folder)) is not None:
        raise CheckpointError(f"{folder}: holds {stored} weights; {task} the folder that it was made of")


def held_otherwise(folder: Path) -> dict[WeightType, list[str]]:
    """Layers of a folder of quantised weights whose matrix is not in its bits, by the type that it has.

    The embedding is not counted, nor the head where it is int8.
    """
    usual = "U8" if stored_weights(folder) == "int4" else "I8"
    found: dict[WeightType, list[str]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (likewise)
                layer, _, part = name.rpartition(".")
                if part == "codes" and layer != "lm_head":
                    if file.get_slice(name).get_dtype() != usual:
                        found.setdefault("int8" if usual == "U8" else "int4", []).append(layer)
                elif part == "weight" and len(file.get_slice(name).get_shape()) == 2 and not name.startswith("embed_"):
                    found.setdefault("bfloat16", []).append(layer)
    return {kind: sorted(names) for kind, names in found.items()}


def _quantized_layer(where: str, name: str, parts: dict[str, torch.Tensor], layer: nn.Linear) -> Quantized:
    """The weight of a layer from its codes and scales; CheckpointError says what is wrong with them."""
    if missing := {"codes", "scales"} - set(parts):
        raise CheckpointError(f"{where}: missing tensor {name}.{min(missing)}")
    codes, scales = parts["codes"], parts["scales"]
    groups = -(-layer.in_features // GROUP)
    if codes.dtype not in (torch.int8, torch.uint8):
        raise CheckpointError(f"{where}: {name}.codes holds {codes.dtype}, neither int8 nor uint8")
    if scales.dtype is not torch.bfloat16:
        raise CheckpointError(f"{where}: {name}.scales holds {scales.dtype}, not bfloat16")
    width = groups * GROUP // (1 if codes.dtype is torch.int8 else 2)
    shapes = {"codes": (layer.out_features, width), "scales": (layer.out_features, groups)}
    for part, shape in shapes.items():
        tensor = parts[part]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{where}: {name}.{part} has shape {list(tensor.shape)}, the config asks for {list(shape)}"
            )
    if codes.dtype is torch.int8 and int(codes.min()) == -128:
        raise CheckpointError(f"{where}: {name}.codes has -128; codes are from -127 to 127")
    return unpacked(codes, scales)


def check_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raises CheckpointError that names a tensor with NaN or an infinity in it. One pass: its extremes."""
    if tensor.itemsize == 1:  # torch finds no extremes among float8
        tensor = tensor.float()
    if not tensor.numel() or all(end.isfinite() for end in tensor.aminmax()):
        return
    if count := int(tensor.isfinite().logical_not().sum()):
        raise CheckpointError(f"{path}: {name} has {count} of {tensor.numel()} numbers that are NaN or infinite")


def load_model(folder: Path, dtype: torch.dtype, device: torch.device, *, widen: bool = True) -> LPAForCausalLM:
    """The folder's model in `dtype`, ready for inference; tensors already in `dtype` stay memory-mapped on a CPU.

    Without `widen` matrices that are stored in bfloat16 stay so whatever `dtype` is, for a backend that copies them.

    Raises:
        CheckpointError: a file is missing or truncated, a tensor is missing, extra, of the wrong shape or has a number
            that is not finite.
    """
    config = load_config(folder)
    model = without_weights(config)
    expected = dict(model.named_parameters())  # a tied head is listed once, as the embedding
    found: dict[str, torch.Tensor] = {}
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    parts: dict[str, dict[str, torch.Tensor]] = {}  # of quantised layers
    is_quantized = stored_weights(folder) is not None
    for path in weight_files(folder):
        try:
            path.open("rb").close()  # raises OSError for an unreadable file, so that it is not reported as a broken one
            with safe_open(path, framework="pt", device=str(device)) as file:
                for stored in file.keys():  # noqa: SIM118 (not a mapping)
                    name = stored.removeprefix("model.")  # transformers' saving puts it there
                    layer, _, part = name.rpartition(".")
                    if is_quantized and layer in linears and part in ("codes", "scales"):
                        parts.setdefault(layer, {})[part] = file.get_tensor(stored)
                        if part == "scales":
                            check_finite(path, name, parts[layer][part])
                        continue
                    if name not in expected:
                        raise CheckpointError(f"{path}: unexpected tensor {stored}")
                    if name in found:
                        raise CheckpointError(f"{path}: {name} is there twice")
                    tensor = file.get_tensor(stored)
                    if not tensor.is_floating_point():
                        raise CheckpointError(f"{path}: {name} holds {tensor.dtype}, not floating-point numbers")
                    if tensor.shape != expected[name].shape:
                        raise CheckpointError(
                            f"{path}: {name} has shape {list(tensor.shape)}, the config asks for "
                            f"{list(expected[name].shape)}"
                        )
                    is_kept = tensor.dtype is torch.bfloat16 and tensor.ndim == 2 and not widen
                    found[name] = tensor if is_kept else tensor.to(dtype)
                    check_finite(path, name, found[name])
        except OSError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except SafetensorError as error:
            raise CheckpointError(f"{path}: truncated or not a safetensors file: {error}") from error
    for name, tensors in parts.items():
        if name != "lm_head" or not config.tie_word_embeddings:
            if f"{name}.weight" in found:
                raise CheckpointError(f"{folder}: both {name}.weight and {name}.codes")
            del expected[f"{name}.weight"]
        weight = _quantized_layer(str(folder), name, tensors, linears[name])
        model.set_submodule(name, QuantizedLinear(weight, linears[name].bias, linears[name].in_features))
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(
            f"{folder}: missing tensor {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1)
        )
    model.load_state_dict(found, strict=False, assign=True)
    return completed(model, device)


def completed(model: LPAForCausalLM, device: torch.device) -> LPAForCausalLM:
    """A model whose stored tensors have been assigned, with what is not stored: a tied head, tables of positions."""
    if model.config.tie_word_embeddings and not isinstance(model.lm_head, QuantizedLinear):
        model.lm_head.weight = model.embed_tokens.weight
    if model.rotary is not None:
        model.rotary.build(model.config, device)
    return model.eval().requires_grad_(False)
