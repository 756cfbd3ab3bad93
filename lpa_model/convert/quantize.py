"""A model folder with its matrices in 8 or 4 bits: `checkpoint` says how the file looks and reads it.

A matrix whose error would be large stays in bfloat16. The embedding does, too, since rows are looked up in it; all
other numbers stay as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lpa_model.checkpoint import (
    QUANTIZATION_VERSION,
    CheckpointError,
    load_model,
    load_tokenizer,
    stored_weights,
    write_texts,
    write_weights,
)
from lpa_model.model import LPAForCausalLM
from lpa_model.quantization import Bits, WeightType, bytes_of, packed_codes, quantize, weight_type

MOST_ERROR: dict[Bits, float] = {8: 0.02, 4: 0.2}
"""Of a quantised matrix, relative to its norm: about four and two times what normally distributed numbers have."""


@dataclass(frozen=True)
class Matrix:
    """A layer's weight and what became of it."""

    name: str
    weights: WeightType
    error: float  # norm of the difference to the weight, relative to its own norm; of the type that was tried
    count: int  # of numbers

    @property
    def bytes(self) -> float:
        """In the file."""
        return self.count * bytes_of(self.weights)


def quantize_folder(source: Path, folder: Path, weights: WeightType) -> list[Matrix]:
    """Write the model of `source` into `folder`, its matrices in int8 or int4 (the head in int8 at least).

    Raises:
        CheckpointError: the source cannot be read, or is quantised already.
    """
    if (stored := stored_weights(source)) is not None:
        raise CheckpointError(f"{source}: holds {stored} weights already; quantise the folder that it was made of")
    tokenizer = load_tokenizer(source)
    model = load_model(source, torch.float32, torch.device("cpu"))
    tensors: dict[str, Tensor] = {}
    matrices = list(_quantized(model, weights, tensors))
    for name, parameter in model.named_parameters():
        if name == "embed_tokens.weight":
            tensors[name] = parameter.detach().bfloat16()
        elif f"{name.removesuffix('.weight')}.codes" not in tensors and name not in tensors:
            tensors[name] = parameter.detach()
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder, model.config, tokenizer, source)
    write_weights(
        folder / "model.safetensors",
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        weights=weights,
        format_version=str(QUANTIZATION_VERSION),
    )
    return matrices


def _quantized(model: LPAForCausalLM, weights: WeightType, tensors: dict[str, Tensor]) -> Iterator[Matrix]:
    """Every matrix, after its tensors have been added."""
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        kind = weight_type(weights, is_head=name == "lm_head")
        bits: Bits = 8 if kind == "int8" else 4
        weight = layer.weight.detach()
        found = quantize(weight, bits)
        size = float(weight.norm())
        error = float((found.dequantized()[:, : layer.in_features] - weight).norm()) / size if size else 0.0
        if error > MOST_ERROR[bits]:
            kind = "bfloat16"
            if name != "lm_head" or not model.config.tie_word_embeddings:
                tensors[f"{name}.weight"] = weight.bfloat16()
        else:
            tensors[f"{name}.codes"], tensors[f"{name}.scales"] = packed_codes(found), found.scales
        yield Matrix(name, kind, error, weight.numel())
