"""Every operation of a step in plain torch: what the kernels compute, for the tests and for a CPU.

Sizes that end in "p" are padded to multiples of 16. Everything that is summed is summed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lpa_model.backends.cuda.ops import Ops
from lpa_model.backends.cuda.rows import Decodes, Prompts, Rows
from lpa_model.backends.cuda.weights import Grouped, Heads, KeyUp, Matrix, Norm, PerHead, Rotary


def add_rms_norm(stream: Tensor, branch: Tensor | None, norm: Norm) -> Tensor:
    """stream float32 [rows, d] += branch [rows, d], in place -> RMSNorm of it [rows, d] in the weight's dtype."""
    if branch is not None:
        stream += branch
    return _rms_norm(stream, norm)


def add_layer_norm(stream: Tensor, branch: Tensor, norm: Norm) -> Tensor:
    """stream float32 [rows, d] += LayerNorm(branch [rows, d]), in place -> the stream in the weight's dtype."""
    assert norm.bias is not None
    stream += F.layer_norm(branch.float(), norm.weight.shape, norm.weight.float(), norm.bias.float(), norm.eps)
    return stream.to(norm.weight.dtype)


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """x [rows, in] -> [rows, out] in its dtype; rows may be apart, columns not."""
    return F.linear(x, matrix.weight, matrix.bias)


def grouped_linear(x: Tensor, grouped: Grouped) -> Tensor:
    """x [rows, in] -> [rows, out]: each segment of outputs from its own columns of x."""
    parts = []
    for start, stop, column in grouped.segments:
        some = x[:, column : column + grouped.weight.shape[1]]
        bias = None if grouped.bias is None else grouped.bias[start:stop]
        parts.append(F.linear(some, grouped.weight[start:stop, : some.shape[1]], bias))
    return torch.cat(parts, dim=1)


def per_head(x: Tensor, up: PerHead, out: Tensor) -> None:
    """x [rows, H, in] -> out [rows, H, out], by the matrix of each head's key-value head."""
    group = x.shape[1] // len(up.weight)
    found = torch.einsum("rhi,hoi->rho", x, up.weight.repeat_interleave(group, 0))
    out.copy_(found if up.bias is None else found + up.bias.repeat_interleave(group, 0))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """[rows, f] each -> silu(gate) · up."""
    return F.silu(gate) * up


def rotate_and_write(q: Tensor, k: Tensor, v: Tensor, rows: Rows, heads: Heads, keys: Tensor, values: Tensor) -> None:
    """Normalise and rotate queries and keys, and store keys and values in their slots.

    Args:
        q: [rows, H, dh_p], overwritten.
        k: [rows, H_kv, dh_p]; latent keys [rows, 1, r_p] are stored as they are.
        v: [rows, H_kv, dh_p] or [rows, 1, r_p].
        rows: their positions and slots.
        heads: norms and rotary positions, if any.
        keys, values: one layer's pools [blocks, heads, block_size, width].
    """
    k = k.clone()
    for x, norm in ((q, heads.q_norm), (k, None if heads.keys_latent else heads.k_norm)):
        if norm is not None:
            x[..., : heads.size] = _rms_norm(x[..., : heads.size].float(), norm)
    if heads.rotary is not None:
        rotate(q, rows.positions, heads.rotary)
        if not heads.keys_latent:
            rotate(k, rows.positions, heads.rotary)
    written = rows.slots >= 0
    slots = rows.slots[written].long()
    for pool, new in ((keys, k), (values, v)):
        pool[slots // pool.shape[2], :, slots % pool.shape[2]] = new[written]


def rotate(x: Tensor, positions: Tensor, rotary: Rotary) -> None:
    """x [rows, heads, dh_p], rotated in place by positions int32 [rows]."""
    half = rotary.cos.shape[1]
    cos, sin = (table[positions.long()].unsqueeze(1) for table in rotary)  # [rows, 1, dh/2]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    x[..., : 2 * half] = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, decodes: Decodes, scale: float, rebuilt: KeyUp | None, out: Tensor
) -> None:
    """Attention of one query per row over its sequence in the cache.

    Args:
        q: [m, H, width of the keys]; [m, H, dh_p], rotated, with `rebuilt`.
        keys, values: one layer's pools [blocks, heads, block_size, width].
        decodes: how much each row sees, and where that is.
        scale: factor on the scores.
        rebuilt: what makes keys of latents, where positions forbid to absorb it.
        out: [m, H, width of the values].
    """
    k, seen = _gathered(keys, decodes.tables, decodes.lengths)  # [m, T, heads, width]
    v, _ = _gathered(values, decodes.tables, decodes.lengths)
    if rebuilt is not None:
        heads, size, _ = rebuilt.weight.shape
        bias = None if rebuilt.bias is None else rebuilt.bias.flatten()
        k = F.linear(k[:, :, 0], rebuilt.weight.flatten(0, 1), bias).unflatten(2, (heads, size))
        positions = torch.arange(k.shape[1], device=k.device).clamp_max(len(rebuilt.rotary.cos) - 1)
        flat = k.transpose(0, 1).flatten(1, 2).contiguous()  # [T, m·heads, dh_p]
        rotate(flat, positions, rebuilt.rotary)
        k = flat.view(k.shape[1], -1, heads, size).transpose(0, 1)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[2], 2).float() for x in (k, v))
    scores = torch.einsum("mhw,mthw->mht", q.float(), k) * scale
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)  # a row that sees nothing
    out.copy_(torch.einsum("mht,mthw->mhw", weights, v))


def prompt_attention(
    q: Tensor,
    keys: Tensor,
    key_tables: Tensor,
    values: Tensor,
    value_tables: Tensor,
    prompts: Prompts,
    scale: float,
    out: Tensor,
) -> None:
    """Attention of prompt rows over their sequences, in the cache or in blocks that were expanded from it.

    Args:
        q: [rows, H, dh_p].
        keys, values: [blocks, H_kv, block_size, dh_p] each, however their dimensions lie in memory.
        key_tables, value_tables: int32 [n, width] each: blocks of each span in `keys` and in `values`.
        prompts: the spans, and what each row sees.
        scale: factor on the scores.
        out: [rows, H, dh_p].
    """
    for i, (first, context, length) in enumerate(prompts.spans.tolist()):
        end = torch.tensor([context + length], device=q.device)
        k, _ = _gathered(keys, key_tables[i : i + 1], end)
        v, _ = _gathered(values, value_tables[i : i + 1], end)
        k, v = (x[0].repeat_interleave(q.shape[1] // x.shape[2], 1).float() for x in (k, v))  # [T, H, dh_p]
        rows = slice(first, first + length)
        key, row = torch.arange(len(k), device=q.device), torch.arange(context, context + length, device=q.device)
        start, stop = prompts.hidden[rows, :, None].unbind(1)
        seen = (key <= row[:, None]) & ~((key >= start) & (key < stop))
        scores = torch.einsum("qhw,thw->hqt", q[rows].float(), k) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("hqt,thw->qhw", weights, v).to(out.dtype)


def _gathered(pool: Tensor, tables: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """pool [blocks, heads, block_size, width] by tables [m, n] -> [m, n·block_size, heads, width], zeros behind
    `lengths`; and which tokens lie before them, [m, n·block_size]."""
    found = pool[tables.long()].transpose(2, 3).flatten(1, 2)
    seen = torch.arange(found.shape[1], device=pool.device) < lengths[:, None]
    return found.masked_fill(~seen[..., None, None], 0), seen


def _rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x float32 [..., n] -> [..., n] in the weight's dtype."""
    scale = (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return (x * scale).to(norm.weight.dtype) * norm.weight


TWINS = Ops(
    add_rms_norm,
    add_layer_norm,
    linear,
    grouped_linear,
    per_head,
    swiglu,
    rotate_and_write,
    rotate,
    decode_attention,
    prompt_attention,
)
