"""Weights in 8 and 4 bits, and what a quantised linear layer computes: the reference for the kernels.

Numbers are quantised in groups of 32 along the input, symmetrically: number = scale * code, with codes from -127 to 127
in int8 and from -8 to 7 in int4. A weight's scales are bfloat16, in int8 by the largest number of a group, in int4 by a
search for the least squared error; its codes are chosen after the scale is rounded, so that its rounding costs no
accuracy. The input of a layer is quantised in the same groups, in int8 with float32 scales; products of codes are whole
numbers, and exact.

To quantise what has been quantised to int8 changes nothing: the largest number of a group finds its scale again.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32
"""Numbers of a group, along the input."""
Bits = Literal[8, 4]
WeightType = Literal["float32", "bfloat16", "int8", "int4"]
"""How a backend holds weights in memory."""
MOST_CODE = 127
TINY = 1e-30  # a group whose numbers are smaller is all zeros: 127 / x may be infinite
INT4_STEPS = (8, 7, 7.5, 7.25, 7.75, 8.25, 8.5, 8.75, 6, 6.5, 9, 9.5, 5, 5.5, 10, 4)
"""Quotients of a group's largest number and its scale that are tried in int4."""
ROWS_TOGETHER = 1 << 16  # numbers whose scales are searched together: they stay in the second-level cache


class Quantized(NamedTuple):
    """A weight [out, in], with zeros behind `in` up to whole groups."""

    codes: Tensor  # int8 [out, groups * 32]
    scales: Tensor  # bfloat16 [out, groups]
    bits: Bits

    def dequantized(self) -> Tensor:
        """float32 [out, groups * 32], exact."""
        grouped = self.codes.unflatten(1, (-1, GROUP)).float() * self.scales.float().unsqueeze(2)
        return torch.flatten(grouped, 1)


def quantize(weight: Tensor, bits: Bits) -> Quantized:
    """weight [out, in], of any floating-point type -> its codes and scales."""
    width = -(-weight.shape[1] // GROUP) * GROUP
    grouped = F.pad(weight.float(), (0, width - weight.shape[1])).unflatten(1, (-1, GROUP))  # [out, groups, 32]
    codes, scales = _int8(grouped) if bits == 8 else _int4(grouped)
    return Quantized(codes.flatten(1), scales.squeeze(2), bits)


def _int8(grouped: Tensor) -> tuple[Tensor, Tensor]:
    scales = (grouped.abs().amax(2, keepdim=True) / MOST_CODE).bfloat16()
    return _codes(grouped, scales, -MOST_CODE, MOST_CODE), scales


def _int4(grouped: Tensor) -> tuple[Tensor, Tensor]:
    rows = max(1, ROWS_TOGETHER // max(1, grouped[0].numel()))
    scales = torch.cat([int4_scales(part) for part in grouped.split(rows)])
    return _codes(grouped, scales, -8, 7), scales


def int4_scales(grouped: Tensor, importance: Tensor | None = None) -> Tensor:
    """Scales of about the least squared error, bfloat16 [out, groups, 1], of weights [out, groups, 32].

    For each of INT4_STEPS the codes, and for these the best scale, c.w / c.c: of either sign, so that the largest
    number of a group may be -8 of them. `importance` [groups, 32]: what a number's squared error counts, 1 for None.
    """
    peak = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    x = grouped / torch.where(peak == 0, 1, peak)  # of the order of 1: squares of very small numbers would be zero
    weighted = x if importance is None else x * importance
    best, ratio = torch.zeros_like(peak), torch.zeros_like(peak)
    for step in INT4_STEPS:
        codes = (x * -step).round_().clamp_(-8, 7)
        inner = (weighted * codes).sum(2, keepdim=True)
        squares = (codes * codes if importance is None else codes * codes * importance).sum(2, keepdim=True)
        gain = inner.square() / squares.clamp_min(TINY)  # what the squared error is less than without the codes
        better = gain > best
        best, ratio = torch.where(better, gain, best), torch.where(better, inner / squares, ratio)
    return (ratio * peak).bfloat16()


def _codes(grouped: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    steps = torch.where(scales == 0, torch.inf, scales.float())
    return (grouped / steps).round_().clamp_(least, most).to(torch.int8)


def quantized_input(x: Tensor) -> Tensor:
    """x [.., in] as the kernels see it, after its codes and scales: the same shape and dtype."""
    width = -(-x.shape[-1] // GROUP) * GROUP
    grouped = F.pad(x.float(), (0, width - x.shape[-1])).unflatten(-1, (-1, GROUP))
    peak = grouped.abs().amax(-1, keepdim=True)
    # a quotient of tensors: torch multiplies a plain number by 1 / peak, which rounds twice
    factor = torch.where(peak < TINY, 0, torch.full_like(peak, MOST_CODE) / peak)
    scale = torch.where(peak < TINY, 0, peak / MOST_CODE)
    return torch.flatten((grouped * factor).round_() * scale, -2)[..., : x.shape[-1]].to(x.dtype)


def packed_codes(weight: Quantized) -> Tensor:
    """Codes as files have them: int8 [out, n], or two of int4 in a byte, plus 8 each, the first in the lower half."""
    if weight.bits == 8:
        return weight.codes.contiguous()
    low, high = (weight.codes + 8).view(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return torch.bitwise_or(low, high << 4)


def unpacked(codes: Tensor, scales: Tensor) -> Quantized:
    """A weight from what `packed_codes` returned."""
    if codes.dtype is torch.int8:
        return Quantized(codes, scales, 8)
    both = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)
    return Quantized(both.view(torch.int8) - 8, scales, 4)


def bytes_of(weights: WeightType) -> float:
    """Of one weight in memory, its share of the scales included."""
    return {"float32": 4, "bfloat16": 2, "int8": 1 + 2 / GROUP, "int4": 0.5 + 2 / GROUP}[weights]


def weight_type(name: WeightType, is_head: bool) -> WeightType:
    """What `--weights` means for one matrix: the head's errors are the logits', so that it has 8 bits at least."""
    return "int8" if name == "int4" and is_head else name


class QuantizedLinear(nn.Linear):
    """A linear layer with a quantised weight, whose input is quantised, too: what the kernels compute, plainly."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Quantized, bias: Tensor | None, in_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = in_features, len(weight.codes), weight.bits
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def quantized(self) -> Quantized:
        """The weight as it is."""
        return Quantized(self.codes, self.scales, self.bits)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # torch's can be assigned, this one is computed
        """float32 [out, in], exact; made of codes and scales whenever it is read."""
        return self.quantized.dequantized()[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out] in x's dtype; products and sums are float32."""
        y = F.linear(quantized_input(x.float()), self.weight, None if self.bias is None else self.bias.float())
        return y.to(x.dtype)


def hold_weights(model: nn.Module, weights: WeightType) -> torch.dtype:
    """Quantise a model's linear layers, where that is how weights are held and they are not yet.

    Returns:
        What the other weights are held in.
    """
    if weights == "float32":
        return torch.float32
    if weights != "bfloat16" and not any(isinstance(layer, QuantizedLinear) for layer in model.modules()):
        for name, layer in [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]:
            bits: Bits = 4 if weight_type(weights, is_head=name == "lm_head") == "int4" else 8
            bias = None if layer.bias is None else layer.bias.detach()
            quantized = quantize(layer.weight.detach(), bits)
            model.set_submodule(name, QuantizedLinear(quantized, bias, layer.in_features))
    return torch.bfloat16


def round_weights(model: nn.Module) -> None:
    """Round what is not quantised of a model's matrices to bfloat16, in their own type."""
    for layer in model.modules():
        if isinstance(layer, nn.Embedding | nn.Linear) and not isinstance(layer, QuantizedLinear):
            rounded = layer.weight.detach().bfloat16().to(layer.weight.dtype)
            layer.weight = nn.Parameter(rounded, requires_grad=False)
