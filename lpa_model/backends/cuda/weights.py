"""A model's weights as a step reads them: factors of one input joined to one matrix, widths padded to multiples of 16.

Padding is zeros, which change no number: ranks, heads and feed-forward widths that are no multiples of 16 get columns
and rows of zeros on both sides of a product. The residual stream is not padded. Matrices are [out, in].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpa_model.layers import LayerNorm, LowRankLinear, RMSNorm, SwiGLU
from lpa_model.model import LPAForCausalLM, PostNormBlock, PreNormBlock
from lpa_model.quantization import QuantizedLinear

UNIT = 16
"""Widths are padded to multiples of it: the least that `tl.dot` takes, and the cache's `width_unit`."""


class Norm(NamedTuple):
    """A norm's own numbers."""

    weight: Tensor
    bias: Tensor | None  # None: RMSNorm
    eps: float

    @classmethod
    def of(cls, norm: nn.Module) -> Norm:
        """Those of a module."""
        assert isinstance(norm, RMSNorm | LayerNorm)
        return cls(norm.weight.detach(), norm.bias.detach() if isinstance(norm, LayerNorm) else None, norm.eps)


class Matrix(NamedTuple):
    """One product: x [rows, in] -> x weight^T + bias [rows, out]."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class Segment(NamedTuple):
    """Outputs of a `Grouped` product that read the same columns of its input; all multiples of 16."""

    start: int
    stop: int
    column: int  # the first one that is read


class Grouped(NamedTuple):
    """Several products in one: each segment of outputs reads its own columns of the input."""

    weight: Tensor  # [out, widest input], zeros behind a narrower one
    bias: Tensor | None  # [out]
    segments: tuple[Segment, ...]
    columns: Tensor  # int32 [out / 16]: the first input column of every 16 outputs


class Rotary(NamedTuple):
    """Tables of rotary positions."""

    cos: Tensor  # float32 [positions, dh / 2]
    sin: Tensor


class KeyUp(NamedTuple):
    """What makes a rotated key of a latent."""

    weight: Tensor  # B_k [H_kv, dh padded, r padded]
    bias: Tensor | None  # [H_kv, dh padded]
    rotary: Rotary


class Heads(NamedTuple):
    """What happens to queries and keys before they meet."""

    size: int  # dh; what lies behind it is padding
    rotary: Rotary | None
    q_norm: Norm | None  # RMSNorm of each head
    k_norm: Norm | None
    keys_latent: bool  # then neither is done to them


class PerHead(NamedTuple):
    """A product of its own for each key-value head."""

    weight: Tensor  # [H_kv, out, in]
    bias: Tensor | None  # [H_kv, out]


class Source(NamedTuple):
    """A projection, and what of it is computed from its input."""

    layer: LowRankLinear | nn.Linear
    heads: int | None = None  # outputs are padded head by head; None: as a whole
    latent: bool = False  # A alone


class Inputs:
    """The projections of one input: first all A factors and dense matrices in one product, then all B factors."""

    def __init__(self, sources: Sequence[Source]) -> None:
        first = [_matrix(s.layer.down) if isinstance(s.layer, LowRankLinear) else _by_head(s.layer, s) for s in sources]
        starts = _starts(first)
        self.first = _joined(first)
        self.second: Grouped | None = None
        ups = [i for i, s in enumerate(sources) if isinstance(s.layer, LowRankLinear) and not s.latent]
        self.parts = [(0, start, start + len(m.weight)) for start, m in zip(starts, first, strict=True)]
        """(product, first output, the one after the last) of each projection."""
        if ups:
            second = [_by_head(cast("LowRankLinear", sources[i].layer).up, sources[i]) for i in ups]
            segments = [
                Segment(start, start + len(matrix.weight), starts[i])
                for i, start, matrix in zip(ups, _starts(second), second, strict=True)
            ]
            width = max(matrix.weight.shape[1] for matrix in second)
            columns = torch.cat([torch.full(((s.stop - s.start) // UNIT,), s.column) for s in segments])
            weight, bias = _joined([Matrix(_pad(m.weight, 1, width), m.bias) for m in second])
            self.second = Grouped(weight, bias, tuple(segments), columns.int().to(weight.device))
            for i, segment in zip(ups, segments, strict=True):
                self.parts[i] = (1, segment.start, segment.stop)


class LayerWeights:
    """One block's."""

    def __init__(
        self, block: PostNormBlock | PreNormBlock, keys_latent: bool, values_latent: bool, rotary: Rotary | None
    ) -> None:
        """`keys_latent`, `values_latent`: the cache's form of this layer."""
        attention, ffn = block.attention, block.ffn
        self.pre_norm = isinstance(block, PreNormBlock)
        self.attention_norm, self.ffn_norm = Norm.of(block.attention_norm), Norm.of(block.ffn_norm)
        self.num_heads, self.kv_heads, self.scale = attention.heads, attention.kv_heads, attention.scale
        q_norm, k_norm = (None if norm is None else Norm.of(norm) for norm in (attention.q_norm, attention.k_norm))
        self.heads = Heads(attention.head_dim, rotary, q_norm, k_norm, keys_latent)
        q, k, v, o = (_linear(attention, f"{name}_proj") for name in "qkvo")
        self.inputs = Inputs(
            [Source(q, self.num_heads), Source(k, self.kv_heads, keys_latent), Source(v, self.kv_heads, values_latent)]
        )
        self.key_up = self._up(k) if keys_latent else None
        self.value_up = self._up(v) if values_latent else None
        self.absorbed: PerHead | None = None  # B_k on the side of the queries
        self.rebuilt: KeyUp | None = None  # or with positions between the two
        if self.key_up is not None:
            if rotary is None:
                self.absorbed = PerHead(self.key_up.weight.transpose(1, 2), None)
            else:
                self.rebuilt = KeyUp(self.key_up.weight, self.key_up.bias, rotary)
        self.output = _chain(o, heads=self.num_heads)
        names = ("gate_proj", "up_proj") if isinstance(ffn, SwiGLU) else ("up_proj",)
        self.ffn_inputs = Inputs([Source(_linear(ffn, name)) for name in names])
        self.ffn_output = _chain(_linear(ffn, "down_proj"))

    def _up(self, layer: LowRankLinear | nn.Linear) -> PerHead:
        """B of latent keys or values."""
        assert isinstance(layer, LowRankLinear)
        weight, bias = _by_head(layer.up, Source(layer, self.kv_heads))
        return PerHead(
            weight.unflatten(0, (self.kv_heads, -1)), None if bias is None else bias.unflatten(0, (self.kv_heads, -1))
        )


class Weights:
    """A loaded model's, for one layout of the cache. It shares what needs no copy, and copies what is joined."""

    def __init__(self, model: LPAForCausalLM, forms: Sequence[tuple[bool, bool]]) -> None:
        """
        Args:
            model: in float32 or bfloat16, on the device of the steps.
            forms: of the cache: whether keys and values of each layer are latents.
        """
        self.config, self.dtype = model.config, model.embed_tokens.weight.dtype
        self.device = model.embed_tokens.weight.device
        self.tokens = model.embed_tokens.weight.detach()
        self.positions: Tensor | None = None
        self.rotary: Rotary | None = None
        if model.rotary is None:
            self.positions = model.embed_positions.weight.detach()
        else:
            self.rotary = Rotary(model.rotary.cos, model.rotary.sin)
        self.norm = None if model.norm is None else Norm.of(model.norm)
        self.layers = [
            LayerWeights(cast("PostNormBlock | PreNormBlock", block), *form, self.rotary)
            for block, form in zip(model.layers, forms, strict=True)
        ]
        self.head = _plain(model.lm_head)


def padded(width: int) -> int:
    """The next multiple of 16."""
    return -(-width // UNIT) * UNIT


def _linear(module: nn.Module, name: str) -> LowRankLinear | nn.Linear:
    layer = getattr(module, name)
    assert isinstance(layer, LowRankLinear | nn.Linear)
    return layer


def _plain(linear: nn.Linear) -> Matrix:
    assert not isinstance(linear, QuantizedLinear), "a backend for a GPU holds no weights in few bits"
    return Matrix(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _matrix(linear: nn.Linear) -> Matrix:
    """With outputs padded."""
    weight, bias = _plain(linear)
    rows = padded(len(weight))
    return Matrix(_pad(weight, 0, rows), None if bias is None else _pad(bias, 0, rows))


def _by_head(linear: nn.Linear, source: Source) -> Matrix:
    """With outputs padded head by head, and for B its input padded as A's outputs are."""
    weight, bias = _plain(linear)
    if isinstance(source.layer, LowRankLinear):
        weight = _pad(weight, 1, padded(weight.shape[1]))
    if source.heads is None:
        return Matrix(_pad(weight, 0, padded(len(weight))), None if bias is None else _pad(bias, 0, padded(len(bias))))
    return Matrix(_pad_heads(weight, source.heads), None if bias is None else _pad_heads(bias, source.heads))


def _pad_heads(x: Tensor, heads: int) -> Tensor:
    """[heads·dh, ...] -> [heads·padded(dh), ...]."""
    by_head = x.unflatten(0, (heads, -1))
    return _pad(by_head, 1, padded(by_head.shape[1])).flatten(0, 1)


def _chain(layer: LowRankLinear | nn.Linear, heads: int | None = None) -> list[Matrix]:
    """A projection back into the stream, one product or two; its input is padded, head by head if it has heads."""
    weight, bias = _matrix(layer.down) if isinstance(layer, LowRankLinear) else _plain(layer)
    by_head = weight.unflatten(1, (heads or 1, -1))
    weight = _pad(by_head, 2, padded(by_head.shape[2])).flatten(1)
    if not isinstance(layer, LowRankLinear):
        return [Matrix(weight, bias)]
    second = _plain(layer.up)
    return [Matrix(weight, bias), Matrix(_pad(second.weight, 1, len(weight)), second.bias)]


def _pad(x: Tensor, dim: int, size: int) -> Tensor:
    """x with zeros behind it along one dimension, up to `size`."""
    missing = size - x.shape[dim]
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x


def _starts(matrices: Sequence[Matrix]) -> list[int]:
    """Where the outputs of each begin if they are joined."""
    starts = [0]
    for matrix in matrices:
        starts.append(starts[-1] + len(matrix.weight))
    return starts[:-1]


def _joined(matrices: Sequence[Matrix]) -> Matrix:
    """Matrices of one input, one below the other."""
    biases = [matrix.bias for matrix in matrices]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in matrices])
    return Matrix(torch.cat([matrix.weight for matrix in matrices]), bias)
