"""A step in one go: all layers as one program, with no operator of torch between them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpa_model.attention import AttentionMetadata
from lpa_model.cache import LatentCache
from lpa_model.kernels import records
from lpa_model.kernels.attention import call_of_layer, scratch_of_step
from lpa_model.kernels.instructions import paired_products
from lpa_model.kernels.launch import Kernel
from lpa_model.kernels.programs import PAIR, Program, fits, product, tiled, tiled_gates
from lpa_model.kernels.prompts import NO_PROMPTS
from lpa_model.layers import LayerNorm, LowRankLinear, RMSNorm, SwiGLU

if TYPE_CHECKING:
    from lpa_model.model import LPAForCausalLM, Setting1Block, Setting2Block


MOST_ROWS = 512  # of a program's run: so many stay in the cores' caches from one operation to the next


def rebuilds_keys(model: LPAForCausalLM, cache: LatentCache) -> bool:
    """Whether cached keys are latents that have to become keys before they can be turned."""
    return model.rotary is not None and any(keys_latent for keys_latent, _ in cache.forms)


def can_fuse(model: LPAForCausalLM, cache: LatentCache) -> bool:
    """Whether all that a step over this cache meets is there as operations of a program; rebuilding keys is not."""
    linears = [module for block in model.layers for module in block.modules() if isinstance(module, nn.Linear)]
    gated = [module for module in model.modules() if isinstance(module, SwiGLU)]
    return (
        model.embed_tokens.weight.dtype is torch.bfloat16
        and model.embed_tokens.weight.device.type == "cpu"
        and bool(paired_products())
        and all(fits(linear.weight) for linear in linears)
        and model.config.head_size % 32 == 0
        and all(isinstance(part, nn.Linear) for ffn in gated for part in (ffn.gate_proj, ffn.up_proj))
        and not model.config.qk_norm
        and cache.block_size % 32 == 0
        and not rebuilds_keys(model, cache)
    )


@dataclass(frozen=True)
class Weights:
    """A linear layer's."""

    tiles: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, linear: nn.Module) -> Weights:
        assert isinstance(linear, nn.Linear)
        weight, bias = linear.weight.data, None if linear.bias is None else linear.bias.data
        spare = -len(weight) % PAIR  # of a head whose vocabulary does not fill the last tiles
        return cls(tiled(F.pad(weight, (0, 0, 0, spare))), None if bias is None else F.pad(bias, (0, spare)))

    @property
    def width(self) -> int:
        """Outputs."""
        return self.tiles.shape[0] * self.tiles.shape[3]


class FusedLayer:
    """A block's weights, and its operations over a cache."""

    def __init__(self, block: Setting1Block | Setting2Block, cache: LatentCache) -> None:
        attention, ffn = block.attention, block.ffn
        self.heads, self.scale, self.joint_ranks = attention.heads, attention.scale, attention.joint_ranks
        self.keys, self.values = cache.keys[attention.layer], cache.values[attention.layer]
        keys_latent, values_latent = cache.forms[attention.layer]
        # the block's own, so that nothing else of it stays
        self.norms: tuple[nn.Module, nn.Module] = deepcopy((block.attention_norm, block.ffn_norm))
        joint = attention.joint_down
        self.joint = None if joint is None else Weights.of(joint)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.firsts = [
            Weights.of(layer.down) if joint is None and isinstance(layer, LowRankLinear) else None
            for layer in projections
        ]
        query, key, value = (layer.up if isinstance(layer, LowRankLinear) else layer for layer in projections)
        group = self.heads // attention.kv_heads
        self.query, self.key, self.absorbed = Weights.of(query), None, None
        if keys_latent:
            by_head = attention.key_up().transpose(1, 2).repeat_interleave(group, 0)
            self.absorbed = Weights(tiled(by_head.flatten(0, 1)), None)  # of [H * r, dh]
        else:
            self.key = Weights.of(key)
        self.value, self.up = None, None
        if values_latent:
            up, bias = attention.value_up()
            bias = None if bias is None else bias.view(up.shape[:2]).repeat_interleave(group, 0).flatten()
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
    """The rows of a step through all layers of a model whose weights are rotated and joined for inference.

    A row's result depends on nothing but the row: to the bit the same in any company, in any step. In the cache's pools
    of values two tokens lie side by side, [num_blocks, heads, block_size / 2, width, 2].
    """

    def __init__(self, model: LPAForCausalLM, cache: LatentCache, kernel: Kernel) -> None:
        self.kernel, self.cache = kernel, cache
        self.rotary, self.norm, self.width = model.rotary, model.norm, model.config.hidden_size
        self.layers = [FusedLayer(cast("Setting1Block | Setting2Block", block), cache) for block in model.layers]
        self.output, self.vocab_size = Weights.of(model.lm_head), model.config.vocab_size
        self.capacity = 0

    def __call__(self, x: Tensor, meta: AttentionMetadata) -> Tensor:
        """x float32 [rows, d], embedded -> [rows, d] as the model's `forward` returns it.

        The result may be overwritten by the next step.
        """
        if len(x) <= MOST_ROWS:
            return self._run(x, meta)
        out = torch.empty(len(x), self.width, dtype=torch.float32 if self.norm is None else torch.bfloat16)
        row = 0
        for part in meta.cut(MOST_ROWS):
            rows = slice(row, row + part.num_rows)
            out[rows] = self._run(x[rows], part)
            row = rows.stop
        return out

    def _run(self, x: Tensor, meta: AttentionMetadata) -> Tensor:
        rows = len(x)
        if rows > self.capacity:
            self._write(max(8, 1 << (rows - 1).bit_length()))
        self.stream[:rows] = x
        if self.norm is None:
            self.normed[:rows] = x
        calls = self.calls
        calls["rows"] = meta.num_decode
        alive = self._decode_rows(meta) if meta.num_decode else None
        tiled_values = None
        if meta.num_decode < rows:
            prompts = meta.prompt_rows
            tiled_values = torch.empty(self.value_rows, prompts.value_tiles * 32, dtype=torch.bfloat16)
            fields = prompts.fields | {"tiled_values": tiled_values.data_ptr()}
        else:
            fields = NO_PROMPTS
        for name, value in fields.items():
            calls[name] = value
        self.program.run(self.kernel, rows)
        del alive, tiled_values
        return self.stream[:rows] if self.norm is None else self.normed[:rows]

    def head(self, hidden: Tensor) -> Tensor:
        """hidden bfloat16 [rows, d], contiguous -> logits bfloat16 [rows, vocab]."""
        logits = product(self.kernel, hidden, self.output.tiles, self.output.bias)
        return logits[:, : self.vocab_size].contiguous()

    def _decode_rows(self, meta: AttentionMetadata) -> object:
        """Tell the calls of the decode rows; returns what has to live until they have run."""
        calls, at = self.calls, meta.decode_rows
        items = len(at.item_rows)
        partial = torch.empty(items * self.partial_size, dtype=torch.float32)
        counters = np.zeros((len(calls), at.num_counters), dtype=np.int64)
        scratch = scratch_of_step(partial, items * calls["heads"] * calls["value_width"])
        for name, value in (at.fields | scratch).items():
            calls[name] = value
        calls["counters"] = counters.ctypes.data + counters.strides[0] * np.arange(len(calls))
        return partial, counters

    def _write(self, capacity: int) -> None:
        """The program for up to `capacity` rows."""
        self.capacity = capacity
        self.stream = torch.empty(capacity, self.width)
        self.normed = torch.empty(capacity, self.width, dtype=torch.bfloat16)
        turns = None if self.rotary is None else self.rotary.turns
        program = Program(np.zeros(len(self.layers), dtype=records.CALL))
        for layer, call in zip(self.layers, program.calls, strict=True):
            program.clear()
            for name, value in layer.write(program, self.stream, self.normed, turns).items():
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
    return [Weights.of(part) for part in ((layer.down, layer.up) if isinstance(layer, LowRankLinear) else (layer,))]
