"""Weights as the GEMM reads them: packed panels of 16 outputs each, padded with zeros to whole ones.

float32 panels are [out / 16, in, 16]; bfloat16 ones [out / 16, in / 32, 16, 16, 2], in which two inputs lie side by
side (the VNNI layout, whose [16, 16, 2] is a tile of AMX). Those of int8 and int4 are bytes [out / 16, size], as
csrc/gemm_quantized.h has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lpa_model.backends.cpu.args import Dtype
from lpa_model.quantization import GROUP, Quantized, WeightType, quantize

PANEL_WIDTH = 16  # outputs of a panel
PAIR = 2 * PANEL_WIDTH  # outputs come in whole pairs of panels
DEPTH = 32  # inputs of a tile
CACHE_LINE = 64


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's weight in panels, and its bias.

    With `groups` > 1 the input is [rows, groups * in_features], and each group of inputs has an equal share of the
    outputs.
    """

    panels: Tensor
    dtype: Dtype
    bias: Tensor | None  # [out_features], padded like it
    in_features: int  # of a group, padded
    out_features: int  # of all groups, padded; of a gated pair: of one of the two
    groups: int = 1
    gated: bool = False

    @property
    def num_panels(self) -> int:
        return self.panels.shape[0]


def padded(features: int) -> int:
    """The width of activations whose padding is zeros: whole pairs of panels."""
    return -(-features // PAIR) * PAIR


def pack(
    weight: Tensor, bias: Tensor | None = None, groups: int = 1, *, weights: WeightType | None = None
) -> PackedWeight:
    """Weight [groups * out, in] and bias [groups * out] in panels of the type `weights`, by default the weight's own.

    `out` and `in` of each group are padded to multiples of 32 with zeros, so that padded outputs are zeros.

    Raises:
        ValueError: there are no panels of the weight's type.
    """
    out, width = weight.shape[0] // groups, padded(weight.shape[1])
    by_group = F.pad(weight.unflatten(0, (groups, out)), (0, width - weight.shape[1], 0, padded(out) - out))
    if bias is not None:
        bias = F.pad(bias.view(groups, out), (0, padded(out) - out)).flatten().contiguous()
    return PackedWeight(*_panels(by_group.flatten(0, 1), weights), bias, width, groups * padded(out), groups)


def pack_gated(gate: Tensor, up: Tensor, *, weights: WeightType | None = None) -> PackedWeight:
    """Both weights [out, in], a panel of one after a panel of the other: for the epilogue SWIGLU_GATED, whose output is
    silu(x . gate) * (x . up)."""
    out, width = padded(gate.shape[0]), padded(gate.shape[1])
    (first, dtype), (second, _) = (
        _panels(F.pad(w, (0, width - w.shape[1], 0, out - w.shape[0])), weights) for w in (gate, up)
    )
    panels = torch.stack([first, second], dim=1).flatten(0, 1)
    return PackedWeight(panels, dtype, None, width, out, gated=True)


def _panels(weight: Tensor, weights: WeightType | None) -> tuple[Tensor, Dtype]:
    if weights == "int8":
        return _int8_panels(quantize(weight, 8)), Dtype.INT8
    if weights == "int4":
        return _int4_panels(quantize(weight, 4)), Dtype.INT4
    if weights is not None:
        weight = weight.to(torch.float32 if weights == "float32" else torch.bfloat16)
    out, width = weight.shape
    if weight.dtype is torch.float32:
        return weight.view(out // PANEL_WIDTH, PANEL_WIDTH, width).transpose(1, 2).contiguous(), Dtype.FLOAT32
    if weight.dtype is not torch.bfloat16:
        raise ValueError(f"weights are float32 or bfloat16, not {weight.dtype}")
    shape = (out // PANEL_WIDTH, PANEL_WIDTH, width // DEPTH, DEPTH // 2, 2)
    return weight.view(shape).permute(0, 2, 3, 1, 4).contiguous(), Dtype.BFLOAT16


def _int8_panels(weight: Quantized) -> Tensor:
    out, width = weight.codes.shape
    shape = (out // PANEL_WIDTH, PANEL_WIDTH, width // GROUP, GROUP // 4, 4)
    codes = weight.codes.view(shape).permute(0, 2, 3, 1, 4)  # [panels, groups, 8, 16, 4]
    return _with_scales(weight.scales, codes.flatten(1).view(torch.uint8))


def _int4_panels(weight: Quantized) -> Tensor:
    out, width = weight.codes.shape
    shape = (out // PANEL_WIDTH, PANEL_WIDTH, width // GROUP, 2, GROUP // 8, 4)
    low, high = (weight.codes + 8).view(torch.uint8).view(shape).permute(3, 0, 2, 4, 1, 5)  # [panels, groups, 4, 16, 4]
    return _with_scales(weight.scales, (low | high << 4).flatten(1))


def _with_scales(scales: Tensor, codes: Tensor) -> Tensor:
    by_panel = scales.unflatten(0, (-1, PANEL_WIDTH)).transpose(1, 2).flatten(1).view(torch.uint8)
    return torch.cat([F.pad(by_panel, (0, -by_panel.shape[1] % CACHE_LINE)), codes], dim=1)
