"""Weights as the GEMM reads them: packed panels of 16 outputs each, padded with zeros to whole ones.

float32 panels are [out / 16, in, 16]; bfloat16 ones [out / 16, in / 32, 16, 16, 2], in which two inputs lie side by
side (the VNNI layout, whose [16, 16, 2] is a tile of AMX). Those of int8 and int4 are bytes [out / 16, size], as
csrc/gemm_quantized.h has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lpa_model.backends.cpu.args import Dtype
from lpa_model.backends.cpu.huge_pages import HugePages
from lpa_model.quantization import GROUP, Quantized

PANEL_WIDTH = 16  # outputs of a panel
PAIR = 2 * PANEL_WIDTH  # outputs come in whole pairs of panels
DEPTH = 32  # inputs of a tile
CACHE_LINE = 64

Weight = Tensor | Quantized
"""[out, in], a row for each output."""


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


def pack(weight: Weight, bias: Tensor | None = None, groups: int = 1, memory: HugePages | None = None) -> PackedWeight:
    """Weight [groups * out, in] and bias [groups * out] in panels of the weight's own type.

    `out` and `in` of each group are padded to multiples of 32 with zeros, so that padded outputs are zeros. `memory`:
    where the panels are put.

    Raises:
        ValueError: there are no panels of the weight's type.
    """
    out = rows_of(weight) // groups
    whole = by_rows(weight, lambda rows: pad_rows(rows.unflatten(0, (groups, out)), padded(out)).flatten(0, 1))
    if bias is not None:
        bias = F.pad(bias.view(groups, out), (0, padded(out) - out)).flatten().contiguous()
    panels, dtype, width = _panels(whole)
    return PackedWeight(_placed([panels], memory), dtype, bias, width, groups * padded(out), groups)


def pack_gated(gate: Weight, up: Weight, memory: HugePages | None = None) -> PackedWeight:
    """Both weights [out, in], a panel of one after a panel of the other: for the epilogue SWIGLU_GATED, whose output is
    silu(x . gate) * (x . up)."""
    out = padded(rows_of(gate))
    (first, dtype, width), (second, _, _) = (_panels(by_rows(w, lambda rows: pad_rows(rows, out))) for w in (gate, up))
    return PackedWeight(_placed([first, second], memory), dtype, None, width, out, gated=True)


def rows_of(weight: Weight) -> int:
    """Outputs of a weight."""
    return len(weight.codes if isinstance(weight, Quantized) else weight)


def by_rows(weight: Weight, change: Callable[[Tensor], Tensor]) -> Weight:
    """A weight whose rows, one per output, have been put elsewhere or padded."""
    if isinstance(weight, Quantized):
        return weight._replace(codes=change(weight.codes), scales=change(weight.scales))
    return change(weight)


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """[.., n, width] -> [.., rows, width]; x itself if it has as many."""
    return x if x.shape[-2] == rows else F.pad(x, (0, 0, 0, rows - x.shape[-2]))


def _placed(parts: Sequence[Tensor], memory: HugePages | None) -> Tensor:
    """A copy of panels [n, ..], those of several parts taking turns; words of four bytes are two bfloat16 numbers."""
    (num, *sizes), dtype = parts[0].shape, parts[0].dtype
    shape = (num * len(parts), *sizes)
    panels = torch.empty(shape, dtype=dtype) if memory is None else memory.empty(shape, dtype)
    for i, part in enumerate(parts):
        panels[i :: len(parts)] = part
    return panels.view(torch.bfloat16).unflatten(-1, (-1, 2)) if dtype is torch.int32 else panels


def _panels(weight: Weight) -> tuple[Tensor, Dtype, int]:
    """The panels of a weight of whole pairs of panels, not copied if they are not quantised, their type, and their
    inputs. Two bfloat16 numbers are a word of int32."""
    if isinstance(weight, Quantized):
        panels, dtype = (_int8_panels, Dtype.INT8) if weight.bits == 8 else (_int4_panels, Dtype.INT4)
        return panels(weight), dtype, weight.codes.shape[1]
    out, width = len(weight), padded(weight.shape[1])
    if width != weight.shape[1]:
        weight = F.pad(weight, (0, width - weight.shape[1]))
    if weight.dtype is torch.float32:
        return weight.reshape(out // PANEL_WIDTH, PANEL_WIDTH, width).transpose(1, 2), Dtype.FLOAT32, width
    if weight.dtype is not torch.bfloat16:
        raise ValueError(f"weights are float32 or bfloat16, not {weight.dtype}")
    return _interleaved(weight, width // DEPTH), Dtype.BFLOAT16, width


def _int8_panels(weight: Quantized) -> Tensor:
    codes = _interleaved(weight.codes, weight.codes.shape[1] // GROUP)  # [panels, groups, 8, 16]
    return _with_scales(weight.scales, codes.flatten(1).view(torch.uint8))


def _int4_panels(weight: Quantized) -> Tensor:
    low, high = (weight.codes + 8).view(torch.uint8).unflatten(1, (-1, 2, GROUP // 2)).unbind(2)
    codes = _interleaved((low | high << 4).flatten(1), low.shape[1])  # [panels, groups, 4, 16]
    return _with_scales(weight.scales, codes.flatten(1).view(torch.uint8))


def _interleaved(rows: Tensor, parts: int) -> Tensor:
    """[out, in] -> int32 [out / 16, parts, in of a part, 16]: four bytes of each of 16 rows side by side."""
    words: Tensor = rows.contiguous().view(torch.int32).unflatten(0, (-1, PANEL_WIDTH)).unflatten(2, (parts, -1))
    return words.permute(0, 2, 3, 1)


def _with_scales(scales: Tensor, codes: Tensor) -> Tensor:
    by_panel = scales.unflatten(0, (-1, PANEL_WIDTH)).transpose(1, 2).flatten(1).view(torch.uint8)
    return torch.cat([F.pad(by_panel, (0, -by_panel.shape[1] % CACHE_LINE)), codes], dim=1)
