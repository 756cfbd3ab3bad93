"""Attention of one step over the paged latent cache, in plain torch.

A token's path follows from its role alone, so that no result depends on scheduling: prompt and scored tokens go
`expanded` (keys and values are rebuilt from the latents once, then ordinary attention), generated tokens go
`absorbed` where positions allow it, and read the pools where they lie (lpa_model/README.md, "Absorption";
DeepSeek-V2's MLA).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lpa_model.attention import Attention
from lpa_model.backends.torch.decode import decode_attention, decode_pairs
from lpa_model.batch import Batch, Span
from lpa_model.cache import LatentCache
from lpa_model.layers import RotaryEmbedding

TILE = 64  # tokens
PER_HEAD_ROWS = 16


class PagedAttention:
    """What `Attention` calls in every layer of one step: writes the step's keys and values, then attends."""

    def __init__(self, batch: Batch, cache: LatentCache, rotary: RotaryEmbedding | None, *, padding: int = 0) -> None:
        """`padding`: rows after the batch's, which are never read."""
        device = cache.keys[0].device

        def tensor(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.cache, self.rotary = cache, rotary
        self.rows, self.num_decode = batch.num_rows, batch.num_decode
        self.positions = tensor(np.pad(batch.positions, (0, padding)))
        self.slots = tensor(batch.slots // batch.block_size), tensor(batch.slots % batch.block_size)
        self.pairs = None
        if decodes := batch.spans[: batch.num_decode]:
            lengths = np.array([span.context + 1 for span in decodes])
            self.pairs = decode_pairs(lengths, [span.block_table for span in decodes], batch.block_size, device)
        self.groups = list(_prefill_groups(batch, device))

    def __call__(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Latents [rows, r] of q, k and v (a dense projection's input) -> [rows, H, dh]."""
        keys_latent, values_latent = self.cache.forms[layer.layer]
        q = layer.queries(q)
        k = k.unsqueeze(1) if keys_latent else layer.keys(k)
        v = v.unsqueeze(1) if values_latent else layer.values(v)
        if self.rotary is not None:
            q = self.rotary(q, self.positions)
            k = k if keys_latent else self.rotary(k, self.positions)
        k, v = self.cache.write(layer.layer, self.slots, k[: self.rows], v[: self.rows])
        parts = [self._decode(layer, q[: self.num_decode])] if self.num_decode else []
        for group in self.groups:
            parts.append(self._expanded(layer, q[group.rows], k[group.rows], v[group.rows], group))
        return torch.cat([*parts, q[self.rows :]])

    def _decode(self, layer: Attention, q: Tensor) -> Tensor:
        """q [requests, H, dh], rotated -> [requests, H, dh]; absorbs B_k into the queries and B_v into the outputs."""
        assert self.pairs is not None
        keys_latent, values_latent = self.cache.forms[layer.layer]
        blocks = self.pairs.blocks
        keys, values = self.cache.read(layer.layer, blocks, q.dtype)
        if keys_latent and self.rotary is None:
            q = _per_kv_head(q, layer.key_up().to(q.dtype))
        elif keys_latent and self.rotary is not None:
            # rebuilt block by block: the rotation between the query and B_k forbids absorption
            keys = self.rotary(layer.keys(keys[:, 0]), self.pairs.positions).transpose(1, 2)
        out = decode_attention(q, keys, values, self.pairs, layer.scale)
        if values_latent:
            up, up_bias = layer.value_up()
            out = _per_kv_head(out, up.transpose(1, 2))
            if up_bias is not None:  # attention weights sum to 1, so the values' bias comes through whole
                out = out + up_bias.repeat_interleave(layer.heads // layer.kv_heads, 0)
        return out

    def _expanded(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor, group: PrefillGroup) -> Tensor:
        """Prompt rows [batch·length, ...] against their cached context and themselves -> [batch·length, H, dh]."""
        keys_latent, values_latent = self.cache.forms[layer.layer]
        q, k, v = (x.view(group.batch, group.length, *x.shape[1:]) for x in (q, k, v))
        if group.context:
            cached = self.cache.gather(layer.layer, group.blocks, group.context, q.dtype)
            k, v = (torch.cat(pair, dim=1) for pair in zip(cached, (k, v), strict=True))
        if keys_latent:
            k = layer.keys(k.squeeze(2))
            k = k if self.rotary is None else self.rotary(k, group.positions)
        if values_latent:
            v = layer.values(v.squeeze(2))
        before, behind = group.padding
        q = _pad_tokens(q, before, behind)
        k, v = _pad_tokens(k, 0, behind), _pad_tokens(v, 0, behind)
        tiles = [
            layer.attention(rows, k[:, : mask.shape[1]], v[:, : mask.shape[1]], mask)
            for rows, mask in zip(q.split(TILE, dim=1), group.masks, strict=True)
        ]
        out = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)
        return out[:, before : before + group.length].flatten(0, 1)


@dataclass(frozen=True)
class PrefillGroup:
    """Consecutive prompt spans of equal shape, attended together.

    Tiles of TILE tokens that begin at multiples of TILE, padded with rows and keys that are never read. So every matmul
    has the same shape however a prompt is chunked and batched, and a row's result is the same to the bit.
    """

    rows: slice  # batch * length rows of the step
    batch: int
    length: int
    context: int
    blocks: Tensor  # [batch, blocks of the context] int64
    positions: Tensor  # [context + length] int64
    masks: tuple[Tensor, ...]  # of each tile [TILE, end of the tile] bool, True where visible

    @property
    def padding(self) -> tuple[int, int]:
        """Rows that fill up the first tile before the span, and the last one behind it."""
        end = self.context + self.length
        return self.context % TILE, -end % TILE


def _prefill_groups(batch: Batch, device: torch.device) -> Iterator[PrefillGroup]:
    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    start, spans = batch.num_decode, batch.prompts
    while spans:
        first = spans[0]
        count = next((i for i, span in enumerate(spans) if span.shape != first.shape), len(spans))
        blocks = [np.asarray(span.block_table, dtype=np.int64) for span in spans[:count]]
        used = -(-first.context // batch.block_size)
        end = start + count * first.length
        yield PrefillGroup(
            rows=slice(start, end),
            batch=count,
            length=first.length,
            context=first.context,
            blocks=tensor(np.stack([table[:used] for table in blocks])),
            positions=tensor(first.positions()),
            masks=tuple(mask.to(device) for mask in _masks(first)),
        )
        start, spans = end, spans[count:]


def _masks(span: Span) -> Sequence[Tensor]:
    context, end = span.context, span.context + span.length
    ends = range(context // TILE * TILE + TILE, end + TILE, TILE)
    if not span.is_branched:
        # what any tile sees is the right end of this: all tokens before it, and of its own those up to each row
        causal = torch.from_numpy(np.arange(end + TILE) <= end + np.arange(TILE)[:, None])
        return [causal[:, end + TILE - tile_end :] for tile_end in ends]
    mask = span.mask()
    whole = np.zeros((len(ends) * TILE, ends[-1]), dtype=bool)
    whole[context % TILE : context % TILE + len(mask), : mask.shape[1]] = mask
    return [torch.from_numpy(whole[i * TILE : (i + 1) * TILE, :tile_end]) for i, tile_end in enumerate(ends)]


def _pad_tokens(x: Tensor, before: int, behind: int) -> Tensor:
    """x [batch, T, heads, width] with rows of zeros around it."""
    return F.pad(x, (0, 0, 0, 0, before, behind)) if before or behind else x


def _per_kv_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, H, a], weight [H_kv, a, b] -> [rows, H, b]; consecutive query heads share a key-value head.

    Rows are multiplied PER_HEAD_ROWS at a time: a matmul with another number of rows might round differently.
    """
    rows, heads, width = x.shape
    kv_heads = weight.shape[0]
    tiles = F.pad(x, (0, 0, 0, 0, 0, -rows % PER_HEAD_ROWS)).view(-1, PER_HEAD_ROWS, kv_heads, heads // kv_heads, width)
    by_head = tiles.transpose(1, 2).flatten(2, 3)  # [tiles, H_kv, PER_HEAD_ROWS·group, a]
    found = torch.cat([tile @ weight for tile in by_head.unbind()])  # [tiles·H_kv, PER_HEAD_ROWS·group, b]
    return (
        found.view(len(tiles), kv_heads, PER_HEAD_ROWS, -1, weight.shape[2])
        .transpose(1, 2)
        .flatten(0, 1)[:rows]
        .flatten(1, 2)
    )
