"""Attention over a flat batch and a paged latent cache.

The path of a token follows its role alone: prompt and scored tokens go `expanded` (keys and values are rebuilt from
the latents once and meet ordinary attention), generated tokens take the `decode` path, which reads the pool where it
lies and, where positions allow it, never rebuilds a key or a value (LPA.md section 4). A model whose steps are programs
(see `fused`) has other kernels for both, in which prompt rows too meet latents as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lpa_model.cache import LatentCache
from lpa_model.config import LPAConfig
from lpa_model.decode import DecodePairs, decode_attention, decode_pairs
from lpa_model.kernels.attention import DecodeRows
from lpa_model.kernels.attention import decode_attention as compiled_decode_attention
from lpa_model.kernels.launch import Kernel
from lpa_model.kernels.prompts import PromptRows
from lpa_model.layers import LowRankLinear, RMSNorm, RotaryEmbedding, first_half, projection, second_half

TILE = 64  # tokens
PER_HEAD_ROWS = 16


class Span(NamedTuple):
    """Tokens of one request in a step: `length` new ones after `context` tokens that are in the cache."""

    context: int
    length: int
    block_table: Sequence[int]  # covers context + length tokens
    decode: bool  # generated token (length 1) or prompt
    branches: tuple[int, ...] = ()  # where continuations begin that see only themselves and what is before the first

    def positions(self) -> NDArray[np.int64]:
        """[context + length]: every branch goes on where the common beginning ends."""
        index = np.arange(self.context + self.length)
        if not self.branches:
            return index
        return index - self._branch_starts(index) + np.minimum(index, self.branches[0])

    def mask(self) -> NDArray[np.bool_]:
        """[length, context + length]: which tokens each new one sees."""
        index = np.arange(self.context + self.length)
        new = index[self.context :, None]
        visible: NDArray[np.bool_] = index <= new
        if self.branches:
            starts = self._branch_starts(index)
            visible &= (index < self.branches[0]) | (starts == starts[self.context :, None])
        return visible

    def hidden(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(starts, ends) [length]: each new token sees what is before it but for those."""
        index = np.arange(self.context, self.context + self.length)
        if not self.is_branched:
            return index, index
        starts = np.minimum(index, self.branches[0])
        return starts, np.where(index < self.branches[0], index, self._branch_starts(index))

    def _branch_starts(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the branch of each token begins; for the common beginning the token itself."""
        branch = np.searchsorted(self.branches, index, side="right") - 1
        return np.where(branch < 0, index, np.asarray(self.branches)[branch])

    @property
    def is_branched(self) -> bool:
        """Whether tokens of branches are among the new ones."""
        return bool(self.branches) and self.context + self.length > self.branches[0]

    @property
    def shape(self) -> tuple[int, int, tuple[int, ...]]:
        """Prompt spans of one shape are attended together."""
        return self.context, self.length, self.branches if self.is_branched else ()


@dataclass(frozen=True)
class PrefillGroup:
    """Consecutive prompt spans of equal shape, attended together: rows start..start + batch·length.

    Queries meet keys in tiles of TILE tokens that begin at multiples of TILE, filled up with rows and keys that
    nobody reads. So every product has the same shape however a prompt is cut into chunks and whatever else is in the
    batch, and a row's result is the same to the bit.
    """

    start: int
    batch: int
    length: int
    context: int
    blocks: Tensor  # [batch, blocks of the context] int64
    positions: Tensor  # [context + length] int64
    span: Span  # one of them

    @cached_property
    def masks(self) -> tuple[Tensor, ...]:
        """Of each tile [TILE, end of the tile] bool, True where visible."""
        end = self.context + self.length
        ends = range(self.context // TILE * TILE + TILE, end + TILE, TILE)
        device = self.positions.device
        if self.span.is_branched:
            return tuple(torch.from_numpy(tile).to(device) for tile in _tiles(self.span.mask(), self.context, ends))
        # what any tile sees is the right end of this: all tokens before it, and of its own those up to each row
        causal = torch.from_numpy(np.arange(end + TILE) <= end + np.arange(TILE)[:, None]).to(device)
        return tuple(causal[:, end + TILE - tile_end :] for tile_end in ends)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.batch * self.length)

    @property
    def padding(self) -> tuple[int, int]:
        """Rows that fill up the first tile before the span, and the last one behind it."""
        end = self.context + self.length
        return self.context % TILE, -end % TILE


@dataclass(frozen=True)
class AttentionMetadata:
    """Where each token of a flat batch stands: decode rows first, then prompt rows, then padding rows."""

    spans: Sequence[Span]
    block_size: int
    positions: Tensor  # [rows, padding included] int64
    num_decode: int
    num_rows: int  # without padding

    @classmethod
    def build(cls, spans: Sequence[Span], block_size: int, device: torch.device, padding: int = 0) -> AttentionMetadata:
        """Lay out `spans` (decode spans first) as a flat batch followed by `padding` rows that nobody reads."""
        num_decode = sum(span.decode for span in spans)
        decodes = spans[:num_decode]
        assert all(span.decode and span.length == 1 for span in decodes), "decode spans come first, one token each"
        positions = np.concatenate([s.positions()[s.context :] for s in spans])
        return cls(
            spans=spans,
            block_size=block_size,
            positions=torch.from_numpy(np.pad(positions, (0, padding))).to(device),
            num_decode=num_decode,
            num_rows=len(positions),
        )

    def cut(self, most: int) -> Iterator[AttentionMetadata]:
        """The same rows, but for padding, in order and at most so many at a time."""
        spans: list[Span] = []
        room = most
        for span in self.spans:
            while span.length > room:
                if room:
                    spans.append(span._replace(length=room))
                    span = span._replace(context=span.context + room, length=span.length - room)
                yield AttentionMetadata.build(spans, self.block_size, self.positions.device)
                spans, room = [], most
            spans.append(span)
            room -= span.length
        yield AttentionMetadata.build(spans, self.block_size, self.positions.device)

    # what only some of the ways through a layer need, once for all layers

    @cached_property
    def groups(self) -> tuple[PrefillGroup, ...]:
        """The prompt rows for expanded attention."""

        def tensor(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(self.positions.device)

        prompts = self.spans[self.num_decode :]
        tables = [np.asarray(span.block_table, dtype=np.int64) for span in prompts]
        return tuple(_prefill_groups(prompts, tables, self.num_decode, self.block_size, tensor))

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """(blocks, offsets) of the real rows, int64."""
        index = np.concatenate([np.arange(s.context, s.context + s.length) for s in self.spans])
        blocks = np.concatenate(
            [
                np.asarray(s.block_table)[np.arange(s.context, s.context + s.length) // self.block_size]
                for s in self.spans
            ]
        )
        device = self.positions.device
        return torch.from_numpy(blocks).to(device), torch.from_numpy(index % self.block_size).to(device)

    @cached_property
    def pairs(self) -> DecodePairs:
        """The decode rows for `decode_attention`."""
        return decode_pairs(*self._decodes(), self.block_size, self.positions.device)

    @cached_property
    def decode_rows(self) -> DecodeRows:
        """The decode rows for the compiled kernel."""
        return DecodeRows.build(self.positions[: self.num_decode].numpy(), *self._decodes(), self.block_size)

    @cached_property
    def prompt_rows(self) -> PromptRows:
        """The prompt rows for a program."""
        prompts = self.spans[self.num_decode :]
        real = slice(self.num_decode, self.num_rows)
        blocks, offsets = (part[real].numpy() for part in self.slots)
        hidden = None
        if any(span.is_branched for span in prompts):
            starts, ends = zip(*(span.hidden() for span in prompts), strict=True)
            hidden = np.concatenate(starts), np.concatenate(ends)
        return PromptRows.build(
            [span.context for span in prompts],
            [span.length for span in prompts],
            [span.block_table for span in prompts],
            self.block_size,
            self.positions[real].numpy(),
            blocks * self.block_size + offsets,
            hidden,
        )

    def _decodes(self) -> tuple[NDArray[np.int64], list[Sequence[int]]]:
        spans = self.spans[: self.num_decode]
        return np.array([span.context + 1 for span in spans]), [span.block_table for span in spans]


ToTensor = Callable[[NDArray[Any]], Tensor]


def _prefill_groups(
    spans: Sequence[Span],
    tables: Sequence[NDArray[np.int64]],
    start: int,
    block_size: int,
    tensor: ToTensor,
) -> Iterator[PrefillGroup]:
    at = 0
    while at < len(spans):
        span = spans[at]
        context, length = span.context, span.length
        end = at + 1
        while end < len(spans) and spans[end].shape == span.shape:
            end += 1
        blocks = np.stack([table[: -(-context // block_size)] for table in tables[at:end]])
        yield PrefillGroup(start, end - at, length, context, tensor(blocks), tensor(span.positions()), span)
        start += (end - at) * length
        at = end


def _tiles(mask: NDArray[np.bool_], context: int, ends: range) -> Iterator[NDArray[np.bool_]]:
    """The mask [length, context + length] of a span in the tiles that end at `ends`."""
    front = context % TILE
    whole = np.zeros((len(ends) * TILE, ends[-1]), dtype=bool)
    whole[front : front + len(mask), : mask.shape[1]] = mask
    for i, end in enumerate(ends):
        yield whole[i * TILE : (i + 1) * TILE, :end]


class Attention(nn.Module):
    """Low-dimensional projected attention: q, k, v and o are each low-rank or dense (LPA paper, section 3)."""

    def __init__(self, config: LPAConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads, config.head_size
        self.scale = self.head_dim**-0.5
        self.q_proj = projection(config, "q", layer)
        self.k_proj = projection(config, "k", layer)
        self.v_proj = projection(config, "v", layer)
        self.o_proj = projection(config, "o", layer)
        self.q_norm = RMSNorm(config.head_size, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, config.eps) if config.qk_norm else None
        # A of q, k and v as one product: set by `prepare_for_inference`
        self.joint_down: nn.Module | None = None
        self.joint_ranks: list[int] = []
        # what decode rows take where there is one: likewise
        self.kernel: Future[Kernel | None] | None = None

    def forward(
        self, x: Tensor, rotary: RotaryEmbedding | None, meta: AttentionMetadata | None, cache: LatentCache | None
    ) -> Tensor:
        """x [rows, d] with `meta` and `cache`, or [batch, T, d] without either (causal, no cache) -> same shape."""
        if meta is None or cache is None:
            return self._plain(x, rotary)
        q, k, v = self._first_halves(x)
        q = self._split(self._normed(second_half(self.q_proj, q), self.q_norm))
        keys_latent, values_latent = cache.forms[self.layer]
        if not keys_latent:
            k = self._normed(second_half(self.k_proj, k), self.k_norm)
        if not values_latent:
            v = second_half(self.v_proj, v)

        parts = []  # in the order of the rows
        done, real = 0, meta.num_rows
        # keys that have to be rebuilt and turned are none of the kernel's business
        rebuilds = keys_latent and rotary is not None
        if meta.num_decode and not rebuilds and self.kernel is not None and (kernel := self.kernel.result()):
            done = meta.num_decode
            parts.append(self._decode_compiled(kernel, q[:done], k[:done], v[:done], rotary, meta.decode_rows, cache))
        if done < real:
            if rotary is not None:
                q = rotary(q, meta.positions)
            k = k.unsqueeze(1) if keys_latent else self._keys(k, rotary, meta.positions)
            v = v.unsqueeze(1) if values_latent else self._split(v)
            blocks, offsets = meta.slots
            cache.write(self.layer, (blocks[done:], offsets[done:]), k[done:real], v[done:real])
        if done < meta.num_decode:
            parts.append(self._decode(q[: meta.num_decode], rotary, meta.pairs, cache))
        for group in meta.groups:
            parts.append(self._expanded(q[group.rows], k[group.rows], v[group.rows], rotary, group, cache))
        if real < len(q):
            parts.append(q[real:])  # padding, which nobody reads
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        y: Tensor = self.o_proj(out.flatten(1))
        return y

    def _first_halves(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [rows, d] -> the latents [rows, r] of q, k and v, or x itself for a dense one."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if self.joint_down is None:
            return tuple(first_half(layer, x) for layer in layers)
        latents: tuple[Tensor, ...] = self.joint_down(x).split(self.joint_ranks, -1)
        return latents

    def _plain(self, x: Tensor, rotary: RotaryEmbedding | None) -> Tensor:
        q, k, v = self._first_halves(x)
        q = self._split(self._normed(second_half(self.q_proj, q), self.q_norm))
        k = self._normed(second_half(self.k_proj, k), self.k_norm)
        v = self._split(second_half(self.v_proj, v))
        positions = torch.arange(x.shape[1], device=x.device)
        if rotary is not None:
            q = rotary(q, positions)
        k = self._keys(k, rotary, positions)
        y: Tensor = self.o_proj(self._attend(q, k, v, None).flatten(2))
        return y

    def _decode(self, q: Tensor, rotary: RotaryEmbedding | None, pairs: DecodePairs, cache: LatentCache) -> Tensor:
        """q [requests, H, dh] -> [requests, H, dh]; absorbs B_k into the queries and B_v into the outputs."""
        keys_latent, values_latent = cache.forms[self.layer]
        keys, values = cache.keys[self.layer][pairs.blocks], cache.values[self.layer][pairs.blocks]
        if keys_latent and rotary is None:
            q = _per_kv_head(q, self.key_up())
        elif keys_latent:  # rotary keys are rebuilt block by block: rotation stands between the query and B_k
            rebuilt = second_half(self.k_proj, keys[:, 0])  # [n, block_size, H_kv·dh]
            keys = self._keys(rebuilt, rotary, pairs.positions).transpose(1, 2)
        out = decode_attention(q, keys, values, pairs, self.scale)
        if values_latent:
            up, up_bias = self.value_up()
            out = _per_kv_head(out, up.transpose(1, 2))
            if up_bias is not None:  # attention weights sum to 1, so the values' bias comes through whole
                out = out + self._split(up_bias).repeat_interleave(self.heads // self.kv_heads, 0)
        return out

    def _decode_compiled(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: RotaryEmbedding | None,
        rows: DecodeRows,
        cache: LatentCache,
    ) -> Tensor:
        """`_decode` with rotary turns and the cache's new entries inside: k and v as the projections leave them."""
        keys_latent, values_latent = cache.forms[self.layer]
        if keys_latent:
            q = _per_kv_head(q, self.key_up()).contiguous()
        up, up_bias = self.value_up() if values_latent else (None, None)
        return compiled_decode_attention(
            kernel,
            q,
            k,
            v,
            cache.keys[self.layer],
            cache.values[self.layer],
            rows,
            self.scale,
            turns=None if rotary is None else rotary.turns,
            up=up,
            up_bias=up_bias,
        )

    def _expanded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: RotaryEmbedding | None,
        group: PrefillGroup,
        cache: LatentCache,
    ) -> Tensor:
        """Prompt rows [batch·length, ...] against their cached context and themselves -> [batch·length, H, dh]."""
        q, k, v = (x.view(group.batch, group.length, *x.shape[1:]) for x in (q, k, v))
        if group.context:
            k = torch.cat((cache.gather(cache.keys[self.layer], group.blocks, group.context), k), dim=1)
            v = torch.cat((cache.gather(cache.values[self.layer], group.blocks, group.context), v), dim=1)
        keys_latent, values_latent = cache.forms[self.layer]
        if keys_latent:
            k = self._keys(second_half(self.k_proj, k.squeeze(2)), rotary, group.positions)
        if values_latent:
            v = self._split(second_half(self.v_proj, v.squeeze(2)))
        before, behind = group.padding
        q = _pad_tokens(q, before, behind)
        k, v = _pad_tokens(k, 0, behind), _pad_tokens(v, 0, behind)
        tiles = [
            self._attend(rows, k[:, : mask.shape[1]], v[:, : mask.shape[1]], mask)
            for rows, mask in zip(q.split(TILE, dim=1), group.masks, strict=True)
        ]
        out = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)
        return out[:, before : before + group.length].flatten(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [batch, Tq, H, dh], k and v [batch, Tk, H_kv, dh] -> [batch, Tq, H, dh]; causal without a mask."""
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.heads != self.kv_heads,
        )
        return out.transpose(1, 2)

    def _normed(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """[..., heads·dh] with each head normalised, where the model has a norm for it (`qk_norm`)."""
        return x if norm is None else norm(self._split(x)).flatten(-2)

    def _keys(self, k: Tensor, rotary: RotaryEmbedding | None, positions: Tensor) -> Tensor:
        k = self._split(k)
        return k if rotary is None else rotary(k, positions)

    def _split(self, x: Tensor) -> Tensor:
        """[..., heads·dh] -> [..., heads, dh]."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim)

    def _by_head(self, weight: Tensor) -> Tensor:
        """B [H_kv·dh, r] -> [H_kv, dh, r]."""
        return weight.view(self.kv_heads, self.head_dim, -1)

    def key_up(self) -> Tensor:
        """B_k [H_kv, dh, r] of latent keys."""
        return self._by_head(self._up(self.k_proj).weight)

    def value_up(self) -> tuple[Tensor, Tensor | None]:
        """B_v [H_kv, dh, r] of latent values and its bias [H_kv·dh]."""
        up = self._up(self.v_proj)
        return self._by_head(up.weight), up.bias

    @staticmethod
    def _up(layer: nn.Linear | LowRankLinear) -> nn.Linear:
        assert isinstance(layer, LowRankLinear), "only a low-rank projection is cached as a latent"
        return layer.up


def _pad_tokens(x: Tensor, before: int, behind: int) -> Tensor:
    """x [batch, T, heads, width] with rows of zeros around it."""
    return F.pad(x, (0, 0, 0, 0, before, behind)) if before or behind else x


def _per_kv_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, H, a], weight [H_kv, a, b] -> [rows, H, b]; consecutive query heads share a key-value head.

    Rows are met PER_HEAD_ROWS at a time: a product with more rows, or fewer, might round differently.
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
