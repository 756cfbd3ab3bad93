"""A step with few rows in one go: all layers as one program, with no operator of torch between them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from lpa_model.attention import AttentionMetadata
from lpa_model.cache import LatentCache
from lpa_model.kernels import records
from lpa_model.kernels.attention import call_of_layer, has_tiles, scratch_of_step
from lpa_model.kernels.prompts import NO_PROMPTS
from lpa_model.kernels.launch import Kernel
from lpa_model.kernels.programs import Program, fits, tiled, tiled_gates
from lpa_model.layers import LayerNorm, LowRankLinear, RMSNorm, SwiGLU

if TYPE_CHECKING:
    from lpa_model.model import LPAForCausalLM, Setting1Block, Setting2Block


MOST_ROWS = 256  # with prompt rows among them; oneDNN's products of more are faster, and torch's operators count less


def can_fuse(model: LPAForCausalLM) -> bool:
    """Whether all that a decode step meets is there as operations of a program."""
    linears = [module for block in model.layers for module in block.modules() if isinstance(module, nn.Linear)]
    gates = [module.gate_proj for module in model.modules() if isinstance(module, SwiGLU)]
    return (
        model.embed_tokens.weight.dtype is torch.bfloat16
        and has_tiles()
        and all(fits(linear.weight) for linear in linears)
        and model.config.head_size % 32 == 0
        and all(isinstance(gate, nn.Linear) for gate in gates)
    )


@dataclass(frozen=True)
class Weights:
    """A linear layer's."""

    tiles: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, linear: nn.Module) -> Weights:
        assert isinstance(linear, nn.Linear)
        return cls(tiled(linear.weight.data), None if linear.bias is None else linear.bias.data.clone())

    @property
    def width(self) -> int:
        """Outputs."""
        return self.tiles.shape[0] * self.tiles.shape[3]


class FusedLayer:
    """A block's weights, and its operations."""

    def __init__(self, block: Setting1Block | Setting2Block) -> None:
        self.attention, ffn = block.attention, block.ffn
        self.norms: tuple[nn.Module, nn.Module] = block.attention_norm, block.ffn_norm
        joint = self.attention.joint_down
        self.joint = None if joint is None else Weights.of(joint)
        projections = (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        self.firsts = [
            Weights.of(layer.down) if joint is None and isinstance(layer, LowRankLinear) else None
            for layer in projections
        ]
        self.seconds = [Weights.of(layer.up if isinstance(layer, LowRankLinear) else layer) for layer in projections]
        self.output = _chain(self.attention.o_proj)
        if isinstance(ffn, SwiGLU):
            assert isinstance(ffn.gate_proj, nn.Linear) and isinstance(ffn.up_proj, nn.Linear)
            self.inner = [Weights(tiled_gates(ffn.gate_proj.weight.data, ffn.up_proj.weight.data), None)]
        else:
            self.inner = _chain(ffn.up_proj)
        self.outer = _chain(ffn.down_proj)

    def write(
        self, program: Program, stream: Tensor, normed: Tensor, cache: LatentCache, turns: Tensor | None
    ) -> dict[str, int | float]:
        """Add the layer's operations on `stream` float32 [rows, d], with `normed` bfloat16 [rows, d] between them.

        In setting 1 `normed` is the stream, rounded.

        Returns:
            What the attention's call says of the layer.
        """
        attention_norm, ffn_norm = self.norms
        if isinstance(attention_norm, RMSNorm):
            program.rms_norm(stream, attention_norm.weight, normed, attention_norm.eps)
        attended, call = self._write_attention(program, normed, cache, turns)
        self._write_branch(program, attended, self.output, attention_norm, stream, normed)
        if isinstance(ffn_norm, RMSNorm):
            program.rms_norm(stream, ffn_norm.weight, normed, ffn_norm.eps)
            hidden = _through(program, normed, self.inner, records.GATED)
        else:
            hidden = _through(program, normed, self.inner, records.RELU)
        self._write_branch(program, hidden, self.outer, ffn_norm, stream, normed)
        return call

    def _write_attention(
        self, program: Program, x: Tensor, cache: LatentCache, turns: Tensor | None
    ) -> tuple[Tensor, dict[str, int | float]]:
        attention = self.attention
        keys_latent, values_latent = cache.forms[attention.layer]
        if self.joint is not None:
            latents = _through(program, x, [self.joint]).split(attention.joint_ranks, -1)
        else:
            latents = tuple(x if first is None else _through(program, x, [first]) for first in self.firsts)
        q, k, v = latents
        q = _through(program, q, self.seconds[:1])
        if keys_latent:
            heads, kv_heads = attention.heads, attention.kv_heads
            by_head = attention.key_up().transpose(1, 2).repeat_interleave(heads // kv_heads, 0)  # [H, r, dh]
            absorbed = program.room(len(q), heads * by_head.shape[1])
            program.product(q, tiled(by_head.flatten(0, 1)), absorbed, groups=heads)
            q = absorbed
        else:
            k = _through(program, k, self.seconds[1:2])
        if not values_latent:
            v = _through(program, v, self.seconds[2:])
        up, up_bias = attention.value_up() if values_latent else (None, None)
        out = program.room(len(x), attention.heads * attention.head_dim).unflatten(1, (attention.heads, -1))
        call = call_of_layer(
            q.unflatten(1, (attention.heads, -1)),
            k,
            v,
            cache.keys[attention.layer],
            cache.values[attention.layer],
            out,
            attention.scale,
            turns=turns,
            up=up,
            up_bias=up_bias,
        )
        program.attention()
        program.alive += [q, k, v, up, up_bias, turns]
        return out.flatten(1), call

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
    """The rows of a step through all layers of a model that has been prepared for inference.

    A row's result depends on nothing but the row.
    """

    def __init__(self, model: LPAForCausalLM, kernel: Future[Kernel | None]) -> None:
        self.kernel = kernel
        self.rotary, self.norm, self.width = model.rotary, model.norm, model.config.hidden_size
        self.layers = [FusedLayer(cast("Setting1Block | Setting2Block", block)) for block in model.layers]
        self.cache: LatentCache | None = None
        self.capacity = 0

    def __call__(self, x: Tensor, meta: AttentionMetadata, cache: LatentCache) -> Tensor | None:
        """x float32 [rows, d], embedded -> [rows, d] as the model's `forward` returns it.

        The result is overwritten by the next step. None where a program is not possible, or not the faster way: see
        `takes`.
        """
        rows = len(x)
        if not self.takes(rows, meta, cache) or (kernel := self.kernel.result()) is None:
            return None
        if cache is not self.cache or rows > self.capacity:
            self._write(cache, max(8, 1 << (rows - 1).bit_length()))
        self.stream[:rows] = x
        if self.norm is None:
            self.normed[:rows] = x
        calls, longest = self.calls, 0
        calls["rows"] = meta.num_decode
        alive = self._decode_rows(meta) if meta.num_decode else None
        if meta.num_decode < rows:
            prompts = meta.prompt_rows
            longest = prompts.longest
            tiled_values = torch.empty(self.value_rows, prompts.value_tiles * 32, dtype=torch.bfloat16)
            for name, value in (prompts.fields | {"tiled_values": tiled_values.data_ptr()}).items():
                calls[name] = value
        else:
            for name, value in NO_PROMPTS.items():
                calls[name] = value
        self.program.run(kernel, rows, longest)
        del alive
        return self.stream[:rows] if self.norm is None else self.normed[:rows]

    def takes(self, rows: int, meta: AttentionMetadata, cache: LatentCache) -> bool:
        """Whether rows go through the program: not where keys have to be rebuilt from latents before they can be
        turned, nor many rows or continuations side by side, nor prompt rows over blocks that are not whole tiles."""
        if self.rotary is not None and any(keys_latent for keys_latent, _ in cache.forms):
            return False
        prompts = meta.spans[meta.num_decode :]
        return not prompts or (
            rows <= MOST_ROWS and meta.block_size % 64 == 0
        )

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

    def _write(self, cache: LatentCache, capacity: int) -> None:
        """The program for up to `capacity` rows and this cache."""
        self.cache, self.capacity = cache, capacity
        self.stream = torch.empty(capacity, self.width)
        self.normed = torch.empty(capacity, self.width, dtype=torch.bfloat16)
        turns = None if self.rotary is None else self.rotary.turns
        program = Program(np.zeros(len(self.layers), dtype=records.CALL))
        for layer, call in zip(self.layers, program.calls, strict=True):
            program.clear()
            for name, value in layer.write(program, self.stream, self.normed, cache, turns).items():
                call[name] = value
        if self.norm is not None:
            program.rms_norm(self.stream, self.norm.weight, self.normed, self.norm.eps)
        calls = program.calls
        self.partial_size = int((calls["heads"] * (calls["value_width"] + 2)).max())
        self.value_rows = int((calls["value_heads"] * calls["value_width"]).max())
        self.program, self.calls = program, calls


def _through(program: Program, x: Tensor, weights: Sequence[Weights], then: int = records.BFLOAT16) -> Tensor:
    """x through products one after another, `then` being for the last of them."""
    for i, layer in enumerate(weights):
        last = i + 1 == len(weights)
        width = layer.width // 2 if last and then == records.GATED else layer.width
        out = program.room(len(x), width)
        program.product(x, layer.tiles, out, bias=layer.bias, then=then if last else records.BFLOAT16)
        x = out
    return x


def _chain(layer: nn.Module) -> list[Weights]:
    """A low-rank layer's two products, or a dense one's only one."""
    return [Weights.of(part) for part in ((layer.down, layer.up) if isinstance(layer, LowRankLinear) else (layer,))]
