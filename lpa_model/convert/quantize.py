"""A model folder with its matrices in 8 or 4 bits: `checkpoint` says how the file looks and reads it.

Without a text every matrix is rounded to the nearest; one whose error would be large stays in bfloat16. With a text,
4 bits are chosen by the second moments of what each matrix reads (`compensate`), and matrices for which 8 bits save
most get them: an error e of an output with the mean squared gradient g2 costs g2 e^2 / 2 nats per token (`gradients`).

The embedding stays in bfloat16, since rows are looked up in it; all other numbers stay as they are stored.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lpa_model.checkpoint import (
    QUANTIZATION_VERSION,
    load_model,
    load_tokenizer,
    stored_weights,
    write_texts,
    write_weights,
)
from lpa_model.convert.compensate import Rounded, compensated, to_nearest
from lpa_model.convert.lowrank.calibrate import InputMoments, embed, input_name, push
from lpa_model.convert.lowrank.gradients import output_squares, short
from lpa_model.convert.stream import check_free
from lpa_model.folder import CheckpointError
from lpa_model.model import LPAForCausalLM
from lpa_model.quantization import Bits, Quantized, WeightType, bytes_of, packed_codes, quantize, weight_type

MOST_ERROR: dict[Bits, float] = {8: 0.02, 4: 0.2}
"""Of a quantised matrix, relative to its norm: about four and two times what normally distributed numbers have."""
NATS = 0.01
"""What 4 bits may cost per token, estimated, before any matrix gets 8."""
SHARE_IN_8_BITS = 1 / 5
"""Of the layers' weights, at most: 5.3 bits for each weight then, scales included."""
GRADIENT_TOKENS = 4096
"""Tokens that gradients are taken on: a mean square of each output needs few."""


@dataclass(frozen=True)
class Matrix:
    """A layer's weight and what became of it.

    error: norm of the difference to the weight, relative to its own norm, of the type that was tried; with a text the
        same of the layer's outputs.
    nats: what it costs per token, estimated from gradients; None without a text.
    """

    name: str
    weights: WeightType
    error: float
    count: int  # of numbers
    nats: float | None = None

    @property
    def bytes(self) -> float:
        """In the file."""
        return self.count * bytes_of(self.weights)


Progress = Callable[[int, int], None]
"""Called with the layers done and their number."""


def quantize_folder(
    source: Path,
    folder: Path,
    weights: WeightType,
    windows: Tensor | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Matrix]:
    """Write the model of `source` into `folder`, its matrices in int8 or int4 (the head in int8 at least).

    Args:
        folder: must not exist or be empty; it appears whole or not at all.
        windows: token ids int64 [windows, T] of a text, for int4: what is rounded is chosen by it.

    Raises:
        CheckpointError: the source cannot be read, or is quantised already, or `folder` holds something.
        ValueError: numbers of the model are not finite on that text; the message names the layer.
    """
    check_free(folder)
    if (stored := stored_weights(source)) is not None:
        raise CheckpointError(f"{source}: holds {stored} weights already; quantise the folder that it was made of")
    tokenizer = load_tokenizer(source)
    model = load_model(source, torch.float32, torch.device("cpu"))
    chosen = {} if windows is None else _calibrated(model, windows, progress)
    tensors: dict[str, Tensor] = {}
    matrices = list(_quantized(model, weights, chosen, tensors))
    for name, parameter in model.named_parameters():
        if name == "embed_tokens.weight":
            tensors[name] = parameter.detach().bfloat16()
        elif f"{name.removesuffix('.weight')}.codes" not in tensors and name not in tensors:
            tensors[name] = parameter.detach()
    folder = folder.resolve()
    work = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    work.mkdir(parents=True)
    try:
        write_texts(work, model.config, tokenizer, source)
        write_weights(
            work / "model.safetensors",
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            weights=weights,
            format_version=str(QUANTIZATION_VERSION),
        )
        work.replace(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return matrices


@dataclass(frozen=True)
class Choice:
    """A weight in the bits that were chosen."""

    weight: Quantized
    error: float  # of the outputs, relative
    nats: float


def _quantized(
    model: LPAForCausalLM, weights: WeightType, chosen: dict[str, Choice], tensors: dict[str, Tensor]
) -> Iterator[Matrix]:
    """Every matrix, after its tensors have been added."""
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        weight = layer.weight.detach()
        if choice := chosen.get(name):
            tensors[f"{name}.codes"], tensors[f"{name}.scales"] = packed_codes(choice.weight), choice.weight.scales
            kind: WeightType = "int8" if choice.weight.bits == 8 else "int4"
            yield Matrix(name, kind, choice.error, weight.numel(), choice.nats)
            continue
        kind = weight_type(weights, is_head=name == "lm_head")
        bits: Bits = 8 if kind == "int8" else 4
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


@torch.inference_mode()
def _calibrated(model: LPAForCausalLM, windows: Tensor, progress: Progress) -> dict[str, Choice]:
    """The layers' weights in 4 bits or, where it saves most nats a byte, 8.

    Layers that read the same numbers are one product to the kernels, so they get the same bits.
    """
    hidden = embed(model, windows)
    found: dict[str, tuple[Rounded, Tensor, float]] = {}  # in 4 bits; errors in 8; the mean square of the outputs
    together: dict[tuple[int, str], list[str]] = {}
    for number, block in enumerate(model.layers):
        moments = InputMoments(block)
        with moments:
            push(block, model.rotary, hidden)
        for place, layer in block.named_modules():
            if not isinstance(layer, nn.Linear):
                continue
            name, moment, weight = f"layers.{number}.{place}", moments.of(place), layer.weight.double()
            try:
                rounded = compensated(layer.weight, moment)
            except ValueError as error:
                raise ValueError(f"{name}: {error}; can the model compute that text in float32?") from error
            errors = to_nearest(layer.weight, moment, 8).errors
            found[name] = rounded, errors, float(((weight @ moment) * weight).sum())
            together.setdefault((number, input_name(place)), []).append(name)
        progress(number + 1, len(model.layers))
    del hidden
    with torch.inference_mode(False):
        squares = output_squares(model, short(windows, GRADIENT_TOKENS))
    nats = {name: [float(squares[name] @ e) / 2 for e in (few.errors, many)] for name, (few, many, _) in found.items()}
    counts = {name: few.weight.codes.numel() for name, (few, _, _) in found.items()}

    def worth(names: list[str]) -> float:
        return sum(nats[name][0] - nats[name][1] for name in names) / sum(counts[name] for name in names)

    eight: set[str] = set()
    left, cost = SHARE_IN_8_BITS * sum(counts.values()), sum(few for few, _ in nats.values())
    for names in sorted(together.values(), key=worth, reverse=True):
        if cost <= NATS:
            break
        if (count := sum(counts[name] for name in names)) <= left:
            left, cost = left - count, cost - worth(names) * count
            eight.update(names)
    chosen = {}
    for name, (few, many, size) in found.items():
        in_eight = name in eight
        held = quantize(model.get_submodule(name).get_parameter("weight"), 8) if in_eight else few.weight
        off = float((many if in_eight else few.errors).sum())
        chosen[name] = Choice(held, (off / size) ** 0.5 if size > 0 else 0.0, nats[name][in_eight])
    return chosen
