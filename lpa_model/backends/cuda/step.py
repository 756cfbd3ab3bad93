"""A step through all layers: decode rows from static buffers, or any rows.

No operation of a decode step waits for the device, reads a number from it or depends on one: a CUDA graph can capture
it, and replays it for other rows in the same buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lpa_model.backends.cuda.ops import Ops
from lpa_model.backends.cuda.rows import Prompts, Rows, StepBuffers
from lpa_model.backends.cuda.weights import Inputs, LayerWeights, Matrix, PerHead, Weights
from lpa_model.cache import LatentCache

OnLayer = Callable[[int, Tensor], None]
"""Called with each layer's number, from 0, and its input, the residual stream float32 [rows, d]."""


def decode_step(weights: Weights, cache: LatentCache, buffers: StepBuffers, ops: Ops) -> Tensor:
    """Write the buffers' rows to the cache and compute their hidden states [capacity, d].

    In the weights' dtype (setting 2: after the final norm), as `head` takes them; those of padding rows mean nothing.
    """
    return _forward(weights, cache, buffers.rows, ops, None)


def mixed_step(weights: Weights, cache: LatentCache, rows: Rows, ops: Ops, on_layer: OnLayer | None = None) -> Tensor:
    """Write any rows to the cache and compute their hidden states [rows, d], as `decode_step` does."""
    return _forward(weights, cache, rows, ops, on_layer)


def head(weights: Weights, hidden: Tensor, ops: Ops) -> Tensor:
    """hidden [rows, d] -> logits [rows, vocab] in the weights' dtype."""
    return ops.linear(hidden, weights.head)


def _forward(weights: Weights, cache: LatentCache, rows: Rows, ops: Ops, on_layer: OnLayer | None) -> Tensor:
    stream = F.embedding(rows.ids, weights.tokens).float()
    if weights.positions is not None:
        stream = stream + F.embedding(rows.positions, weights.positions).float()
    x = stream.to(weights.dtype)
    branch: Tensor | None = None
    for number, layer in enumerate(weights.layers):
        if layer.pre_norm:
            x = ops.add_rms_norm(stream, branch, layer.attention_norm)
        if on_layer is not None:
            on_layer(number, stream)
        branch = _attention(layer, x, rows, cache.keys[number], cache.values[number], ops)
        if layer.pre_norm:
            x = ops.add_rms_norm(stream, branch, layer.ffn_norm)
        else:
            x = ops.add_layer_norm(stream, branch, layer.attention_norm)
        branch = _ffn(layer, x, ops)
        if not layer.pre_norm:
            x = ops.add_layer_norm(stream, branch, layer.ffn_norm)
    return x if weights.norm is None else ops.add_rms_norm(stream, branch, weights.norm)


def _attention(layer: LayerWeights, x: Tensor, rows: Rows, keys: Tensor, values: Tensor, ops: Ops) -> Tensor:
    """x [rows, d] -> [rows, d]; keys and values are one layer's pools."""
    q, k, v = _through(layer.inputs, x, ops)
    q, k, v = (
        q.unflatten(1, (layer.num_heads, -1)),
        k.unflatten(1, (keys.shape[1], -1)),
        v.unflatten(1, (values.shape[1], -1)),
    )
    ops.rotate_and_write(q, k, v, rows, layer.heads, keys, values)
    attended = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    m = rows.num_decode
    if rows.decodes is not None:
        queries, found = q[:m], attended[:m]
        if layer.absorbed is not None:
            queries = q.new_empty(m, layer.num_heads, keys.shape[3])
            ops.per_head(q[:m], layer.absorbed, queries)
        if layer.value_up is not None:
            found = q.new_empty(m, layer.num_heads, values.shape[3])
        ops.decode_attention(queries, keys, values, rows.decodes, layer.scale, layer.rebuilt, found)
        if layer.value_up is not None:  # its bias comes through whole: attention weights sum to 1
            ops.per_head(found, layer.value_up, attended[:m])
    if rows.prompts is not None:
        prompts = rows.prompts
        k, key_tables = keys, prompts.tables
        v, value_tables = values, prompts.tables
        if layer.key_up is not None:
            k, key_tables = _expanded(keys, layer.key_up, prompts, ops), prompts.places
            if layer.heads.rotary is not None:
                ops.rotate(k.transpose(1, 2).flatten(0, 1), prompts.key_positions, layer.heads.rotary)
        if layer.value_up is not None:
            v, value_tables = _expanded(values, layer.value_up, prompts, ops), prompts.places
        ops.prompt_attention(q[m:], k, key_tables, v, value_tables, prompts, layer.scale, attended[m:])
    return _chain(layer.output, attended.flatten(1), ops)


def _expanded(pool: Tensor, up: PerHead, prompts: Prompts, ops: Ops) -> Tensor:
    """The spans' latents through B: [blocks of the spans, H_kv, block_size, dh_p], heads inside tokens in memory."""
    latents = F.embedding(prompts.blocks, pool.flatten(1)).view(-1, pool.shape[3])
    bias = None if up.bias is None else up.bias.flatten()
    found = ops.linear(latents, Matrix(up.weight.flatten(0, 1), bias))
    return found.view(len(prompts.blocks), pool.shape[2], len(up.weight), -1).transpose(1, 2)


def _ffn(layer: LayerWeights, x: Tensor, ops: Ops) -> Tensor:
    parts = _through(layer.ffn_inputs, x, ops)
    return _chain(layer.ffn_output, ops.swiglu(*parts) if len(parts) == 2 else F.relu(parts[0]), ops)


def _through(inputs: Inputs, x: Tensor, ops: Ops) -> list[Tensor]:
    """x [rows, in] -> what each projection makes of it [rows, out]: columns of one or two products."""
    found = [ops.linear(x, inputs.first)]
    if inputs.second is not None:
        found.append(ops.grouped_linear(found[0], inputs.second))
    return [found[product][:, start:stop] for product, start, stop in inputs.parts]


def _chain(matrices: Sequence[Matrix], x: Tensor, ops: Ops) -> Tensor:
    for matrix in matrices:
        x = ops.linear(x, matrix)
    return x
