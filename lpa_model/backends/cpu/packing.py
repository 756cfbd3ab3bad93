"""Weights as the GEMM reads them: packed panels of 16 outputs each, padded with zeros to whole ones.

float32 panels are [out / 16, in, 16]; bfloat16 ones [out / 16, in / 32, 16, 16, 2], in which two inputs lie side by
side (the VNNI layout, whose [16, 16, 2] is a tile of AMX).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL_WIDTH = 16  # outputs of a panel
PAIR = 2 * PANEL_WIDTH  # outputs come in whole pairs of panels
DEPTH = 32  # inputs of a tile


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's weight in panels, and its bias.

    With `groups` > 1 the input is [rows, groups * in_features], and each group of inputs has an equal share of the
    outputs.
    """

    panels: Tensor
    bias: Tensor | None  # [out_features], padded like it
    in_features: int  # of a group, padded
    out_features: int  # of all groups, padded; of a gated pair: of one of the two
    groups: int = 1
    gated: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.panels.dtype

    @property
    def num_panels(self) -> int:
        return self.panels.shape[0]


def padded(features: int) -> int:
    """The width of activations whose padding is zeros: whole pairs of panels."""
    return -(-features // PAIR) * PAIR


def pack(weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> PackedWeight:
    """Weight [groups * out, in] and bias [groups * out], float32 or bfloat16, in panels.

    `out` and `in` of each group are padded to multiples of 32 with zeros, so that padded outputs are zeros.
    """
    out, width = weight.shape[0] // groups, padded(weight.shape[1])
    by_group = F.pad(weight.unflatten(0, (groups, out)), (0, width - weight.shape[1], 0, padded(out) - out))
    if bias is not None:
        bias = F.pad(bias.view(groups, out), (0, padded(out) - out)).flatten().contiguous()
    return PackedWeight(_panels(by_group.flatten(0, 1)), bias, width, groups * padded(out), groups)


def pack_gated(gate: Tensor, up: Tensor) -> PackedWeight:
    """Both weights [out, in], a panel of one after a panel of the other: for the epilogue SWIGLU_GATED, whose output is
    silu(x . gate) * (x . up)."""
    out, width = padded(gate.shape[0]), padded(gate.shape[1])
    panels = [_panels(F.pad(w, (0, width - w.shape[1], 0, out - w.shape[0]))) for w in (gate, up)]
    return PackedWeight(torch.stack(panels, dim=1).flatten(0, 1), None, width, out, gated=True)


def _panels(weight: Tensor) -> Tensor:
    out, width = weight.shape
    if weight.dtype is torch.float32:
        return weight.view(out // PANEL_WIDTH, PANEL_WIDTH, width).transpose(1, 2).contiguous()
    if weight.dtype is not torch.bfloat16:
        raise ValueError(f"weights are float32 or bfloat16, not {weight.dtype}")
    shape = (out // PANEL_WIDTH, PANEL_WIDTH, width // DEPTH, DEPTH // 2, 2)
    return weight.view(shape).permute(0, 2, 3, 1, 4).contiguous()
