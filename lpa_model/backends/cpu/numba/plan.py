"""The plan of a step: all layers of a model as one op list, with no torch operator between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpa_model.backends.cpu.numba import records
from lpa_model.backends.cpu.numba.attention import DecodeRows, call_of_layer, scratch_of_step
from lpa_model.backends.cpu.numba.launch import Kernel
from lpa_model.backends.cpu.numba.programs import PAIR, Program, product, tiled, tiled_gates
from lpa_model.backends.cpu.numba.prompts import NO_PROMPTS, PromptRows
from lpa_model.backends.cpu.rotary import interleaved, rope_cache
from lpa_model.batch import Batch
from lpa_model.cache import LatentCache
from lpa_model.config import LPAConfig
from lpa_model.layers import LayerNorm, LowRankLinear, RMSNorm, SwiGLU
from lpa_model.model import LPAForCausalLM, PostNormBlock, PreNormBlock


def unsupported(config: LPAConfig, block_size: int) -> str | None:
    """What of a model or its cache has no operation in an op list, with the remedy; None if there is nothing."""
    widths = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    widths["head_dim"] = config.head_size
    for layer in range(config.num_hidden_layers):
        for projection in config.projections:
            widths[f"the rank of {projection} in layer {layer}"] = config.rank(projection, layer) or 32
            if projection in ("gate", "up") and config.rotary and config.rank(projection, layer) is not None:
                return "gated feed-forward layers of low rank have no operation"
    for name, width in widths.items():
        if width % 32:
            return f"{name}, {width}, is not a multiple of 32"
    if config.qk_norm:
        return "qk_norm has no operation"
    if block_size % 32:
        return f"block_size {block_size} is not a multiple of 32; take 32, 64 or 128"
    return None


@dataclass(frozen=True)
class Weights:
    """A linear layer's."""

    tiles: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, *linears: nn.Linear, rows: Tensor | None = None) -> Weights:
        """Several layers as one, outputs in their order; `rows` reorders the outputs."""
        weight = torch.cat([linear.weight.data for linear in linears])
        biases = [linear.bias.data for linear in linears if linear.bias is not None]  # all have one, or none
        bias = torch.cat(biases) if biases else None
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        spare = -len(weight) % PAIR  # of a head whose vocabulary does not fill the last tiles
        return cls(tiled(F.pad(weight, (0, 0, 0, spare))), None if bias is None else F.pad(bias, (0, spare)))

    @property
    def width(self) -> int:
        """Outputs."""
        return self.tiles.shape[0] * self.tiles.shape[3]


class FusedLayer:
    """A block's weights, and its operations over a cache."""

    def __init__(self, block: PostNormBlock | PreNormBlock, cache: LatentCache) -> None:
        attention, ffn = block.attention, block.ffn
        self.heads, self.scale = attention.heads, attention.scale
        self.keys, self.values = cache.keys[attention.layer], cache.values[attention.layer]
        keys_latent, values_latent = cache.forms[attention.layer]
        # the block's own, so that nothing else of it stays
        self.norms: tuple[nn.Module, nn.Module] = deepcopy((block.attention_norm, block.ffn_norm))
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        downs = [layer.down for layer in projections if isinstance(layer, LowRankLinear)]
        self.joint = Weights.of(*downs) if len(downs) == len(projections) else None
        self.joint_ranks = [down.out_features for down in downs]
        self.firsts = [
            Weights.of(layer.down) if self.joint is None and isinstance(layer, LowRankLinear) else None
            for layer in projections
        ]
        query, key, value = (layer.up if isinstance(layer, LowRankLinear) else layer for layer in projections)
        group = self.heads // attention.kv_heads
        rotary = isinstance(block, PreNormBlock)

        def rotated(linear: nn.Linear) -> Weights:
            if not rotary:
                return Weights.of(linear)
            rows = torch.arange(linear.out_features).view(-1, attention.head_dim)
            return Weights.of(linear, rows=rows[:, interleaved(attention.head_dim)].flatten())

        self.query, self.key, self.absorbed = rotated(query), None, None
        if keys_latent:
            by_head = attention.key_up().transpose(1, 2).repeat_interleave(group, 0)
            self.absorbed = Weights(tiled(by_head.flatten(0, 1)), None)  # of [H * r, dh]
        else:
            self.key = rotated(key)
        self.value, self.up = None, None
        if values_latent:
            up, bias = attention.value_up()
            bias = None if bias is None else bias.repeat_interleave(group, 0).flatten()
            self.up = Weights(tiled(up.repeat_interleave(group, 0).flatten(0, 1)), bias)  # of [H * dh, r]
        else:
            self.value = Weights.of(value)
        self.output = _chain(attention.o_proj)
        if isinstance(ffn, SwiGLU):
            assert isinstance(ffn.gate_proj, nn.Linear) and isinstance(ffn.up_proj, nn.Linear)
            self.inner = [Weights(tiled_gates(ffn.gate_proj.weight.data, ffn.up_proj.weight.data), None)]
        else:
            self.inner = _chain(ffn.up_proj)
        self.outer = _chain(ffn.down_proj)

    def write(self, program: Program, stream: Tensor, normed: Tensor, turns: Tensor | None) -> dict[str, int | float]:
        """Add the layer's operations on `stream` float32 [rows, d], with `normed` bfloat16 [rows, d] between them.

        In setting 1 `normed` is the stream, rounded.

        Returns:
            What the attention's call says of the layer.
        """
        attention_norm, ffn_norm = self.norms
        if isinstance(attention_norm, RMSNorm):
            program.rms_norm(stream, attention_norm.weight, normed, attention_norm.eps)
        attended, call = self._write_attention(program, normed, turns)
        self._write_branch(program, attended, self.output, attention_norm, stream, normed)
        if isinstance(ffn_norm, RMSNorm):
            program.rms_norm(stream, ffn_norm.weight, normed, ffn_norm.eps)
            hidden = _through(program, normed, self.inner, records.GATED)
        else:
            hidden = _through(program, normed, self.inner, records.RELU)
        self._write_branch(program, hidden, self.outer, ffn_norm, stream, normed)
        return call

    def _write_attention(
        self, program: Program, x: Tensor, turns: Tensor | None
    ) -> tuple[Tensor, dict[str, int | float]]:
        if self.joint is not None:
            latents = _through(program, x, [self.joint]).split(self.joint_ranks, -1)
        else:
            latents = tuple(x if first is None else _through(program, x, [first]) for first in self.firsts)
        q, k, v = latents
        q = _through(program, q, [self.query])
        if self.absorbed is not None:
            q = _through(program, q, [self.absorbed], groups=self.heads)
        if self.key is not None:
            k = _through(program, k, [self.key])
        if self.value is not None:
            v = _through(program, v, [self.value])
        out = program.room(len(x), self.heads * self.values.shape[3])
        queries, attended = (rows.unflatten(1, (self.heads, -1)) for rows in (q, out))
        call = call_of_layer(queries, k, v, self.keys, self.values, attended, self.scale, turns=turns)
        program.attention()
        program.alive += [q, k, v, turns]
        return out if self.up is None else _through(program, out, [self.up], groups=self.heads), call

    @staticmethod
    def _write_branch(
        program: Program, x: Tensor, weights: list[Weights], norm: nn.Module, stream: Tensor, normed: Tensor
    ) -> None:
        """The last products of a branch, and its addition to the stream."""
        x = _through(program, x, weights[:-1])
        last = weights[-1]
        if isinstance(norm, LayerNorm):
            branch = _through(program, x, [last])
            program.add_layer_norm(branch, stream, norm.weight, norm.bias, normed, norm.eps)
        else:
            program.product(x, last.tiles, stream, bias=last.bias, then=records.ADDED)


class FusedStep:
    """The rows of a step through all layers of a model.

    A row's result depends on the row alone, to the bit. In the cache's pools of values two tokens lie side by side,
    [num_blocks, heads, block_size / 2, width, 2] (VNNI layout).
    """

    def __init__(self, model: LPAForCausalLM, cache: LatentCache, kernel: Kernel) -> None:
        self.kernel = kernel
        self.width = model.config.hidden_size
        # copies, for a view of a mapped file would keep all of it mapped
        self.norm, self.embed_tokens = deepcopy(model.norm), deepcopy(model.embed_tokens)
        self.embed_positions = None if model.rotary is not None else deepcopy(model.embed_positions)
        self.rope = None if model.rotary is None else rope_cache(model.rotary, model.config.head_size)
        self.layers = [FusedLayer(cast("PostNormBlock | PreNormBlock", block), cache) for block in model.layers]
        self.output, self.vocab_size = Weights.of(model.lm_head), model.config.vocab_size
        self.capacity = 0

    def __call__(self, batch: Batch) -> tuple[Tensor, Mapping[int, Tensor]]:
        """The batch's rows -> hidden states [rows, d] before the head; may be overwritten by the next call.

        And what layers have read, float32 [n, d], of the batch's `hidden` rows.
        """
        x: Tensor = self.embed_tokens(torch.from_numpy(batch.ids)).float()
        if self.embed_positions is not None:
            x = x + self.embed_positions(torch.from_numpy(batch.positions)).float()
        rows = len(x)
        if rows > self.capacity:
            self._write(max(8, 1 << (rows - 1).bit_length()))
        self.stream[:rows] = x
        if self.norm is None:
            self.normed[:rows] = x
        calls = self.calls
        calls["rows"] = batch.num_decode
        alive = self._decode_rows(batch) if batch.num_decode else None
        tiled_values = None
        if batch.prompts:
            prompts = PromptRows.of(batch)
            tiled_values = torch.empty(self.value_rows, prompts.value_tiles * 32, dtype=torch.bfloat16)
            fields = prompts.fields | {"tiled_values": tiled_values.data_ptr()}
        else:
            fields = NO_PROMPTS
        for name, value in fields.items():
            calls[name] = value
        inner, done = {}, 0
        for layer in sorted(batch.hidden.keys() - {len(self.layers)}):
            self.program.run(self.kernel, rows, done, self.starts[layer])
            inner[layer], done = self.stream[torch.from_numpy(batch.hidden[layer])], self.starts[layer]
        self.program.run(self.kernel, rows, done)
        del alive, tiled_values
        return self.stream[:rows] if self.norm is None else self.normed[:rows], inner

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [rows, d] -> logits bfloat16 [rows, vocab]."""
        logits = product(self.kernel, hidden.to(torch.bfloat16).contiguous(), self.output.tiles, self.output.bias)
        return logits[:, : self.vocab_size].contiguous()

    def _decode_rows(self, batch: Batch) -> object:
        """Tell the calls of the decode rows; returns what has to live until they have run."""
        calls, at = self.calls, DecodeRows.of(batch)
        items = len(at.item_rows)
        partial = torch.empty(items * self.partial_size, dtype=torch.float32)
        counters = np.zeros((len(calls), at.num_counters), dtype=np.int64)
        scratch = scratch_of_step(partial, items * calls["heads"] * calls["value_width"])
        for name, value in (at.fields | scratch).items():
            calls[name] = value
        calls["counters"] = counters.ctypes.data + counters.strides[0] * np.arange(len(calls))
        return at, partial, counters

    def _write(self, capacity: int) -> None:
        """The op list for up to `capacity` rows."""
        self.capacity = capacity
        self.stream = torch.empty(capacity, self.width)
        self.normed = torch.empty(capacity, self.width, dtype=torch.bfloat16)
        program = Program(np.zeros(len(self.layers), dtype=records.CALL))
        self.starts = []  # operations before each layer
        for layer, call in zip(self.layers, program.calls, strict=True):
            self.starts.append(len(program.operations))
            program.clear()
            for name, value in layer.write(program, self.stream, self.normed, self.rope).items():
                call[name] = value
        if self.norm is not None:
            program.rms_norm(self.stream, self.norm.weight, self.normed, self.norm.eps)
        calls = program.calls
        self.partial_size = int((calls["heads"] * (calls["value_width"] + 2)).max())
        self.value_rows = int((calls["value_heads"] * calls["value_width"]).max())
        self.program, self.calls = program, calls


def _through(
    program: Program, x: Tensor, weights: Sequence[Weights], then: int = records.BFLOAT16, groups: int = 1
) -> Tensor:
    """x through products one after another, each in as many groups, `then` being for the last of them."""
    for i, layer in enumerate(weights):
        last = i + 1 == len(weights)
        width = layer.width // 2 if last and then == records.GATED else layer.width
        out = program.room(len(x), width)
        after = then if last else records.BFLOAT16
        program.product(x, layer.tiles, out, bias=layer.bias, then=after, groups=groups)
        x = out
    return x


def _chain(layer: nn.Module) -> list[Weights]:
    """A low-rank layer's two products, or a dense one's only one."""
    assert isinstance(layer, LowRankLinear | nn.Linear)
    return [Weights.of(part) for part in ((layer.down, layer.up) if isinstance(layer, LowRankLinear) else (layer,))]
