"""The plan of a step: a model's layers as one op list over packed weights, with no torch operator between them.

Widths, ranks and heads that are not multiples of 32 are padded with zeros when weights are packed, which changes no
result. Weights are copies: the model as it was loaded can be released.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpa_model.attention import Attention
from lpa_model.backends.cpu.args import ATTENTION, Epilogue
from lpa_model.backends.cpu.attention import NO_DECODES, NO_PROMPTS, DecodeRows, PromptRows, layer_fields
from lpa_model.backends.cpu.huge_pages import HugePages
from lpa_model.backends.cpu.library import Kernel
from lpa_model.backends.cpu.oplist import OpList, gemm, rows_apart
from lpa_model.backends.cpu.packing import PackedWeight, Weight, by_rows, pack, pack_gated, pad_rows, padded, rows_of
from lpa_model.backends.cpu.rotary import interleaved, rope_cache
from lpa_model.batch import Batch
from lpa_model.cache import LatentCache
from lpa_model.layers import LayerNorm, LowRankLinear, ReluFFN, RMSNorm, SwiGLU
from lpa_model.model import LPAForCausalLM, PostNormBlock, PreNormBlock
from lpa_model.quantization import Quantized, QuantizedLinear, quantize

WIDTH_UNIT = 32  # numbers that the cache's widths are padded to multiples of

Matrix = tuple[Weight, Tensor | None]
"""A weight [out, in] and its bias [out]."""


@dataclass(frozen=True)
class Norm:
    """A norm's own numbers."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, norm: nn.Module) -> Norm:
        assert isinstance(norm, RMSNorm | LayerNorm)
        bias = norm.bias.detach().clone() if isinstance(norm, LayerNorm) else None
        return cls(norm.weight.detach().clone(), bias, norm.eps)


class LayerPlan:
    """A block's packed weights, and its operations over a cache."""

    def __init__(
        self, block: PostNormBlock | PreNormBlock, cache: LatentCache, held: torch.dtype, memory: HugePages
    ) -> None:
        """`held`: what weights are packed as, unless they are quantised; `memory`: where."""
        self._memory = memory
        attention = block.attention
        self.held = held
        rotary = isinstance(block, PreNormBlock)
        self.pre_norm = rotary
        self.heads, self.scale = attention.heads, attention.scale
        self.keys, self.values = cache.keys[attention.layer], cache.values[attention.layer]
        self.scales = cache.key_scales[attention.layer], cache.value_scales[attention.layer]
        self.norms = Norm.of(block.attention_norm), Norm.of(block.ffn_norm)
        self._pack_attention(attention, rotary, *cache.forms[attention.layer])
        self._pack_ffn(block.ffn)

    def _pack_attention(self, attention: Attention, rotary: bool, keys_latent: bool, values_latent: bool) -> None:
        size, heads, kv_heads = attention.head_dim, attention.heads, attention.kv_heads
        group, order = heads // kv_heads, interleaved(size) if rotary else torch.arange(size)

        def of_heads(linear: nn.Linear, count: int, rows: Tensor) -> Matrix:
            """Outputs of each head in the order `rows`, and padded."""

            def chosen(x: Tensor) -> Tensor:
                return pad_rows(x.unflatten(0, (count, size))[:, rows], padded(size)).flatten(0, 1)

            weight, bias = _matrix(linear, self.held)
            return by_rows(weight, chosen), None if bias is None else chosen(bias.unsqueeze(1)).squeeze(1)

        plain = torch.arange(size)
        projections = (
            (attention.q_proj, heads, order),
            (attention.k_proj, kv_heads, order),
            (attention.v_proj, kv_heads, plain),
        )
        # one GEMM for all that reads the normalised stream: A of low-rank projections, and dense keys and values
        joint: list[Matrix | None] = []
        ups: list[PackedWeight | None] = []
        for name, (layer, count, rows) in zip("qkv", projections, strict=True):
            if isinstance(layer, LowRankLinear):
                joint.append(_matrix(layer.down, self.held))
                latent = (name == "k" and keys_latent) or (name == "v" and values_latent)
                ups.append(None if latent else self._pack(*of_heads(layer.up, count, rows)))
            elif name == "q":  # attention reads whole rows of queries
                joint.append(None)
                ups.append(self._pack(*of_heads(layer, count, rows)))
            else:
                joint.append(of_heads(layer, count, rows))
                ups.append(None)
        self.joint, self.joint_widths = _pack_joint(joint, self._memory)
        self.query, self.key, self.value = ups
        norms = (attention.q_norm, attention.k_norm)
        self.head_norms = [
            None if norm is None else Norm(norm.weight.detach()[order], None, norm.eps) for norm in norms
        ]
        self.absorbed = self.up = None
        if keys_latent:
            by_head = attention.key_up()[:, order].transpose(1, 2).repeat_interleave(group, 0)  # [H, r, dh]
            by_head = F.pad(by_head, (0, padded(size) - size))
            self.absorbed = self._pack(self._transposed_like(attention.k_proj, by_head.flatten(0, 1)), None, heads)
        if values_latent:
            assert isinstance(attention.v_proj, LowRankLinear)

            def for_queries(x: Tensor) -> Tensor:
                repeated: Tensor = x.unflatten(0, (kv_heads, size)).repeat_interleave(group, 0)
                return torch.flatten(repeated, 0, 1)

            weight, bias = _matrix(attention.v_proj.up, self.held)
            self.up = self._pack(by_rows(weight, for_queries), None if bias is None else for_queries(bias), heads)
        (first, bias), *rest = self._matrices(attention.o_proj)
        if size != padded(size):
            plain_first = first.dequantized()[:, : heads * size] if isinstance(first, Quantized) else first
            by_head = F.pad(plain_first.unflatten(1, (heads, size)), (0, padded(size) - size)).flatten(1)
            first = quantize(by_head, 8) if isinstance(first, Quantized) else by_head  # other groups: once more rounded
        self.output = [self._pack(*matrix) for matrix in ((first, bias), *rest)]

    def _pack_ffn(self, ffn: ReluFFN | SwiGLU) -> None:
        self.gated = self.gate_joint = None
        self.gate_widths: list[int] = []
        self.gate: list[PackedWeight] = []
        if isinstance(ffn, SwiGLU):
            gate, up = self._matrices(ffn.gate_proj), self._matrices(ffn.up_proj)
            if len(gate) == len(up) == 1:
                first, second = _alike([gate.pop()[0], up.pop()[0]])
                self.gated = pack_gated(first, second, self._memory)
            elif len(gate) == len(up) == 2:
                self.gate_joint, self.gate_widths = _pack_joint([gate.pop(0), up.pop(0)], self._memory)
            self.gate = [self._pack(*matrix) for matrix in gate]
        else:
            assert isinstance(ffn, ReluFFN)
            up = self._matrices(ffn.up_proj)
        self.inner = [self._pack(*matrix) for matrix in up]
        self.outer = [self._pack(*matrix) for matrix in self._matrices(ffn.down_proj)]

    def _pack(self, weight: Weight, bias: Tensor | None, groups: int = 1) -> PackedWeight:
        return pack(weight, bias, groups, self._memory)

    def _matrices(self, layer: nn.Module) -> list[Matrix]:
        """A low-rank layer's two, or a dense one's only one."""
        assert isinstance(layer, LowRankLinear | nn.Linear)
        parts = (layer.down, layer.up) if isinstance(layer, LowRankLinear) else (layer,)
        return [_matrix(part, self.held) for part in parts]

    def _transposed_like(self, layer: nn.Module, weight: Tensor) -> Weight:
        """What was made of B^T of a low-rank layer, quantised once more if B is, in other groups: to 8 bits, so that it
        costs little beside the first time."""
        assert isinstance(layer, LowRankLinear)
        return quantize(weight, 8) if isinstance(layer.up, QuantizedLinear) else weight.to(self.held)

    def write(self, ops: OpList, stream: Tensor, normed: Tensor, rope: Tensor | None) -> dict[str, int | float]:
        """Add the layer's operations on `stream` float32 [rows, d], with `normed` [rows, d] between them.

        Without a norm before the branches (setting 1) `normed` is the stream, rounded.

        Returns:
            What the attention's record says of the layer.
        """
        attention_norm, ffn_norm = self.norms
        if self.pre_norm:
            ops.rms_norm(stream, attention_norm.weight, normed, attention_norm.eps)
        attended, fields = self._write_attention(ops, normed, rope)
        self._write_branch(ops, attended, self.output, attention_norm, stream, normed)
        if self.pre_norm:
            ops.rms_norm(stream, ffn_norm.weight, normed, ffn_norm.eps)
        self._write_branch(ops, self._write_gate(ops, normed), self.outer, ffn_norm, stream, normed)
        return fields

    def _write_attention(self, ops: OpList, x: Tensor, rope: Tensor | None) -> tuple[Tensor, dict[str, int | float]]:
        parts = [x, x, x]
        if self.joint is not None:
            columns = _through(ops, x, [self.joint]).split(self.joint_widths, -1)
            parts = [part if part.shape[1] else x for part in columns]
        q, k, v = parts
        assert self.query is not None
        q = _through(ops, q, [self.query])
        if self.key is not None:
            k = _through(ops, k, [self.key])
        if self.value is not None:
            v = _through(ops, v, [self.value])
        for rows, norm, heads in zip((q, k), self.head_norms, (self.heads, self.keys.shape[1]), strict=True):
            if norm is not None:
                ops.head_rms_norm(rows, norm.weight, rows, norm.eps, heads)
        if self.absorbed is not None:
            q = _through(ops, q, [self.absorbed])
        out = ops.workspace(len(x), self.heads * self.values.shape[3])
        queries, attended = (rows.unflatten(1, (self.heads, -1)) for rows in (q, out))
        key_scales, value_scales = self.scales
        fields = layer_fields(
            queries,
            k,
            v,
            self.keys,
            self.values,
            attended,
            self.scale,
            rope=rope,
            key_scales=key_scales,
            value_scales=value_scales,
        )
        ops.attention()
        return out if self.up is None else _through(ops, out, [self.up]), fields

    def _write_gate(self, ops: OpList, x: Tensor) -> Tensor:
        if self.gated is not None:
            return _through(ops, x, [self.gated], Epilogue.SWIGLU_GATED)
        if not self.gate:
            return _through(ops, x, self.inner, Epilogue.RELU)
        parts = [x, x]
        if self.gate_joint is not None:
            parts = list(_through(ops, x, [self.gate_joint]).split(self.gate_widths, -1))
        gate, up = _through(ops, parts[0], self.gate), _through(ops, parts[1], self.inner)
        ops.swiglu(gate, up, gate)
        return gate

    def _write_branch(
        self, ops: OpList, x: Tensor, weights: Sequence[PackedWeight], norm: Norm, stream: Tensor, normed: Tensor
    ) -> None:
        """The last GEMMs of a branch, and its addition to the stream."""
        x = _through(ops, x, weights[:-1])
        if self.pre_norm:
            ops.gemm(x, weights[-1], stream, Epilogue.RESIDUAL_ADD)
        else:
            branch = _through(ops, x, weights[-1:])
            ops.add_layer_norm(branch, stream, norm.weight, norm.bias, normed, norm.eps)


class StepPlan:
    """The rows of a step through all layers of a model; a row's result depends on the row alone, to the bit."""

    def __init__(
        self,
        model: LPAForCausalLM,
        cache: LatentCache,
        kernels: Mapping[str, Kernel],
        held: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        """`held`: what weights are packed as, unless they are quantised; `dtype`: of activations."""
        self.kernels, self.dtype = kernels, dtype
        self.vocab_size, self.width = model.config.vocab_size, padded(model.config.hidden_size)
        self.tokens = _copy(model.embed_tokens.weight, held, self.width)
        self.positions = self.rope = self.norm = None
        if model.rotary is None:
            self.positions = _copy(model.embed_positions.weight, dtype, self.width)
        else:
            self.rope = rope_cache(model.rotary, padded(model.config.head_size))
        if model.norm is not None:
            self.norm = Norm.of(model.norm)
        memory = HugePages()
        blocks = [cast("PostNormBlock | PreNormBlock", block) for block in model.layers]
        self.layers = [LayerPlan(block, cache, held, memory) for block in blocks]
        self.output = pack(*_matrix(model.lm_head, held), memory=memory)
        self.capacity = 0

    def __call__(self, batch: Batch) -> tuple[Tensor, Mapping[int, Tensor]]:
        """The batch's rows -> hidden states [rows, d], padded, in the weights' dtype; the next call overwrites them.

        And what layers have read, float32 [n, d], padded, of the batch's `hidden` rows.
        """
        rows = batch.num_rows
        if rows > self.capacity:
            self._write(max(8, 1 << (rows - 1).bit_length()))
        x = self.tokens[torch.from_numpy(batch.ids)].float()
        if self.positions is not None:
            x += self.positions[torch.from_numpy(batch.positions)].float()
        self.stream[:rows] = x
        if self.norm is None:
            self.normed[:rows] = x
        alive = [self._set(self._decode_fields(batch)), self._set(self._prompt_fields(batch))]
        inner = {}
        for layer in self.ops.run_parts(rows, sorted(batch.hidden.keys() - {len(self.layers)})):
            inner[layer] = self.stream[torch.from_numpy(batch.hidden[layer])]
        del alive
        return self.normed[:rows], inner

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [rows, d], padded -> logits [rows, vocab] in the weights' dtype."""
        return gemm(self.kernels, hidden, self.output, self.vocab_size)

    def _set(self, fields_and_owners: tuple[Mapping[str, int | np.ndarray], object]) -> object:
        fields, owners = fields_and_owners
        for name, value in fields.items():
            self.ops.attentions[name] = value
        return owners

    def _decode_fields(self, batch: Batch) -> tuple[Mapping[str, int | np.ndarray], object]:
        """What every layer's record says of the decode rows, and what has to live until they have run."""
        if not batch.num_decode:
            return NO_DECODES, None
        rows, layers = DecodeRows.of(batch), self.ops.attentions
        sizes = layers[["heads", "value_width"]].tolist()
        scratch = torch.empty(max(rows.scratch_floats(*size) for size in sizes))
        counters = np.zeros((len(layers), rows.num_counters), dtype=np.int64)
        by_layer = [rows.scratch_fields(scratch, *size) for size in sizes]
        fields = rows.fields | {name: np.array([layer[name] for layer in by_layer]) for name in by_layer[0]}
        addresses = counters.ctypes.data + counters.strides[0] * np.arange(len(layers))
        return fields | {"counters": addresses}, (rows, scratch, counters)

    def _prompt_fields(self, batch: Batch) -> tuple[Mapping[str, int | np.ndarray], object]:
        if not batch.prompts:
            return NO_PROMPTS, None
        rows, layers = PromptRows.of(batch), self.ops.attentions
        packed = torch.empty(0, dtype=torch.bfloat16)
        if self.dtype is torch.bfloat16:
            size = max(rows.packed_numbers(*sizes) for sizes in layers[["value_heads", "value_width"]].tolist())
            packed = torch.empty(size, dtype=torch.bfloat16)
        return rows.fields | {"packed_values": packed.data_ptr()}, (rows, packed)

    def _write(self, capacity: int) -> None:
        """The op list for up to `capacity` rows."""
        self.capacity = capacity
        self.stream = torch.zeros(capacity, self.width)
        self.normed = rows_apart(capacity, self.width, self.dtype).zero_()
        self.ops = OpList(self.kernels, self.dtype, np.zeros(len(self.layers), dtype=ATTENTION))
        for layer, record in zip(self.layers, self.ops.attentions, strict=True):
            self.ops.free_workspaces()
            for name, value in layer.write(self.ops, self.stream, self.normed, self.rope).items():
                record[name] = value
            self.ops.mark()
        if self.norm is not None:
            self.ops.rms_norm(self.stream, self.norm.weight, self.normed, self.norm.eps)


def _through(ops: OpList, x: Tensor, weights: Sequence[PackedWeight], epilogue: Epilogue = Epilogue.STORE) -> Tensor:
    """x through GEMMs one after another, with the epilogue after the last."""
    for i, weight in enumerate(weights):
        out = ops.workspace(len(x), weight.out_features)
        ops.gemm(x, weight, out, epilogue if i + 1 == len(weights) else Epilogue.STORE)
        x = out
    return x


def _matrix(linear: nn.Linear, held: torch.dtype) -> Matrix:
    weight = linear.quantized if isinstance(linear, QuantizedLinear) else linear.weight.detach().to(held)
    return weight, None if linear.bias is None else linear.bias.detach()


def _alike(weights: Sequence[Weight]) -> list[Weight]:
    """Weights that one GEMM can have: codes of 4 bits are widened beside some of 8; beside others none is quantised."""
    quantized = [weight for weight in weights if isinstance(weight, Quantized)]
    if not quantized:
        return list(weights)
    if len(quantized) == len(weights):
        most = max(weight.bits for weight in quantized)
        return [weight._replace(bits=most) for weight in quantized]
    return [weight.dequantized().bfloat16() if isinstance(weight, Quantized) else weight for weight in weights]


def _pack_joint(matrices: Sequence[Matrix | None], memory: HugePages) -> tuple[PackedWeight | None, list[int]]:
    """Several matrices of one input as one weight, and the padded widths of their outputs, 0 for None."""
    present = [matrix for matrix in matrices if matrix is not None]
    widths = [0 if matrix is None else padded(rows_of(matrix[0])) for matrix in matrices]
    if not present:
        return None, widths
    parts = [by_rows(w, lambda x: pad_rows(x, padded(len(x)))) for w in _alike([weight for weight, _ in present])]
    bias = None
    if given := [bias for _, bias in present if bias is not None]:
        biases = [given[0].new_zeros(rows_of(weight)) if bias is None else bias for weight, bias in present]
        bias = torch.cat([F.pad(bias, (0, padded(len(bias)) - len(bias))) for bias in biases])
    return pack(_joined(parts), bias, memory=memory), widths


def _joined(parts: Sequence[Weight]) -> Weight:
    """Weights of one type, one below the other."""
    quantized = [part for part in parts if isinstance(part, Quantized)]
    if not quantized:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    codes, scales = (torch.cat(columns) for columns in zip(*((q.codes, q.scales) for q in quantized), strict=True))
    return Quantized(codes, scales, quantized[0].bits)


def _copy(x: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """A copy of x [rows, ..], padded to [rows, width]: a view of a mapped file would keep all of it mapped."""
    if x.shape[1] == width:
        return x.detach().to(dtype, copy=True)
    return F.pad(x.detach().to(dtype), (0, width - x.shape[1]))
