"""Attention over a flat batch and a paged latent cache.

The path of a token follows its role alone: prompt and scored tokens go `expanded` (keys and values are rebuilt
from the latents once and meet ordinary attention), generated tokens take the `decode` path, which reads the pool
where it lies and, where positions allow it, never rebuilds a key or a value (LPA.md section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lpa_model.cache import LatentCache
from lpa_model.config import PROJECTIONS, LPAConfig, Projection
from lpa_model.layers import LowRankLinear, RotaryEmbedding, first_half, projection, second_half

# torch's attention takes two thirds longer over 511 keys than over 512
KEY_TILE = 16
PADDED_KEYS = 256  # fewer keys are not worth the copy


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
class DecodePairs:
    """Decode queries spread over (request, block) pairs; pair i belongs to query row `row[i]`.

    The cache is read as `pool[blocks]`: a view of the pool's low end where most of it is in use, else a copy of
    the blocks named. Each of those n blocks meets `multiplicity` query slots; pair i is at `slot[i]` of n·m.
    """

    row: Tensor  # [pairs] int64
    slot: Tensor  # [pairs] int64
    blocks: slice | Tensor
    multiplicity: int
    beyond: Tensor  # [n·m, 1, block_size] bool: keys of the block that the query must not see
    positions: Tensor  # [n, block_size] int64: absolute positions of the keys in each block that queries see


@dataclass(frozen=True)
class PrefillGroup:
    """Consecutive prompt spans of equal shape, attended together: rows start..start + batch·length."""

    start: int
    batch: int
    length: int
    context: int
    blocks: Tensor  # [batch, blocks of the context] int64
    positions: Tensor  # [context + length] int64
    mask: Tensor | None  # [length, keys + padding] bool, True where visible; None for causal without context
    padding: int  # keys after the last one, context + length, which no query sees

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.batch * self.length)


@dataclass(frozen=True)
class AttentionMetadata:
    """Where each token of a flat batch stands: decode rows first, then prompt rows, then padding rows."""

    positions: Tensor  # [rows, padding included] int64
    slots: tuple[Tensor, Tensor]  # (blocks, offsets) of the real rows, int64
    num_decode: int
    pairs: DecodePairs | None
    groups: tuple[PrefillGroup, ...]

    @classmethod
    def build(cls, spans: Sequence[Span], block_size: int, device: torch.device, padding: int = 0) -> AttentionMetadata:
        """Lay out `spans` (decode spans first) as a flat batch followed by `padding` rows that nobody reads."""
        num_decode = sum(span.decode for span in spans)
        decodes, prompts = spans[:num_decode], spans[num_decode:]
        assert all(span.decode and span.length == 1 for span in decodes), "decode spans come first, one token each"
        index = np.concatenate([np.arange(s.context, s.context + s.length) for s in spans])
        positions = index
        if any(span.is_branched for span in spans):
            positions = np.concatenate([s.positions()[s.context :] for s in spans])
        tables = [np.asarray(s.block_table, dtype=np.int64) for s in spans]
        blocks = np.concatenate(
            [
                table[np.arange(s.context, s.context + s.length) // block_size]
                for s, table in zip(spans, tables, strict=True)
            ]
        )

        def tensor(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return cls(
            positions=tensor(np.pad(positions, (0, padding))),
            slots=(tensor(blocks), tensor(index % block_size)),
            num_decode=num_decode,
            pairs=_decode_pairs(decodes, tables[:num_decode], block_size, tensor) if num_decode else None,
            groups=tuple(_prefill_groups(prompts, tables[num_decode:], num_decode, block_size, tensor)),
        )


ToTensor = Callable[[NDArray[Any]], Tensor]


def _decode_pairs(
    spans: Sequence[Span], tables: Sequence[NDArray[np.int64]], block_size: int, tensor: ToTensor
) -> DecodePairs:
    tokens = np.array([span.context + 1 for span in spans])
    per_row = -(-tokens // block_size)  # blocks of each request
    row = np.repeat(np.arange(len(spans)), per_row)
    block = np.concatenate([table[:n] for table, n in zip(tables, per_row, strict=True)])
    start = (np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)) * block_size
    valid = np.minimum(block_size, tokens[row] - start)

    width, multiplicity = int(block.max()) + 1, int(np.bincount(block).max())
    where: slice | Tensor
    if width * multiplicity <= 2 * len(row):  # passing over unused blocks is cheaper than copying the used ones
        order = np.argsort(block, kind="stable")
        by_block = block[order]
        rank = np.empty_like(order)  # how many earlier pairs share the block
        rank[order] = np.arange(len(order)) - np.searchsorted(by_block, by_block)
        slot, where = block * multiplicity + rank, slice(0, width)
        count = np.full(width * multiplicity, block_size)
        count[slot] = valid
        starts = np.zeros(width, dtype=np.int64)
        starts[block] = start
    else:
        multiplicity, slot, where = 1, np.arange(len(row)), tensor(block)
        count, starts = valid, start
    offsets = np.arange(block_size)
    return DecodePairs(
        row=tensor(row),
        slot=tensor(slot),
        blocks=where,
        multiplicity=multiplicity,
        beyond=tensor(offsets >= count[:, None])[:, None],
        # no query sees a key past the longest one; its position may lie beyond the model's last
        positions=tensor(np.minimum(starts[:, None] + offsets, tokens.max() - 1)),
    )


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
        keys = context + length
        padding = -keys % KEY_TILE if keys >= PADDED_KEYS else 0
        masked = context > 0 or span.is_branched
        mask = tensor(np.pad(span.mask(), ((0, 0), (0, padding)))) if masked else None
        blocks = np.stack([table[: -(-context // block_size)] for table in tables[at:end]])
        yield PrefillGroup(start, end - at, length, context, tensor(blocks), tensor(span.positions()), mask, padding)
        start += (end - at) * length
        at = end


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, pairs: DecodePairs, scale: float) -> Tensor:
    """Attention of single queries over paged keys and values, without a copy of either.

    The queries are gathered to (request, block) pairs, one product over the blocks gives every pair its own
    softmax, and the pairs of a request are merged by their maxima and sums in the order of the blocks.

    Args:
        q: [requests, H, key width], in the cache's dtype.
        keys: [n, key heads, block_size, key width], `pool[pairs.blocks]`; query heads are consecutive per key head.
        values: [n, value heads, block_size, value width].
        pairs: where each query meets which block.
        scale: factor on the scores, 1/sqrt(dh).

    Returns:
        [requests, H, value width] in q's dtype; softmax and merge are float32.
    """
    requests, heads, _ = q.shape
    n, m = keys.shape[0], pairs.multiplicity
    queries = q.new_zeros(n * m, heads, q.shape[2])
    queries[pairs.slot] = q[pairs.row]
    scores = _slots(_heads(queries, n, keys.shape[1]) @ keys.transpose(2, 3), m)  # [n·m, H, block_size]
    scores = (scores.float() * scale).masked_fill(pairs.beyond, -torch.inf)
    peak = scores.amax(-1)  # [n·m, H]
    weights = (scores - peak[..., None]).exp()
    partial = _slots(_heads(weights.to(values.dtype), n, values.shape[1]) @ values, m)  # [n·m, H, value width]

    peak, total = peak[pairs.slot], weights.sum(-1)[pairs.slot]  # [pairs, H]
    top = peak.new_full((requests, heads), -torch.inf)
    top = top.scatter_reduce(0, pairs.row[:, None].expand_as(peak), peak, "amax")
    share = (peak - top[pairs.row]).exp()
    denominator = torch.zeros_like(top).index_add(0, pairs.row, total * share)
    output = q.new_zeros(requests, heads, values.shape[3], dtype=torch.float32)
    output.index_add_(0, pairs.row, partial[pairs.slot].float() * share[..., None])
    return (output / denominator[..., None]).to(q.dtype)


def _heads(x: Tensor, n: int, heads: int) -> Tensor:
    """[n·m, H, width] -> [n, heads, m·H/heads, width]: the rows that meet each of the pool's heads."""
    m, group = x.shape[0] // n, x.shape[1] // heads
    return x.view(n, m, heads, group, -1).transpose(1, 2).reshape(n, heads, m * group, -1)


def _slots(x: Tensor, m: int) -> Tensor:
    """The inverse of `_heads`: [n, heads, m·group, width] -> [n·m, H, width]."""
    n, heads, rows, width = x.shape
    return x.view(n, heads, m, rows // m, width).transpose(1, 2).reshape(n * m, -1, width)


def decode_attention_reference(q: Tensor, keys: Tensor, values: Tensor, pairs: DecodePairs, scale: float) -> Tensor:
    """`decode_attention` one query at a time, for the tests: gather its keys, one softmax, float32 throughout."""
    outputs = []
    for request in range(q.shape[0]):
        mine = pairs.slot[pairs.row == request]
        seen = ~pairs.beyond[mine, 0].flatten()  # [tokens of this request's blocks]
        k, v = (
            pool[mine // pairs.multiplicity].transpose(0, 1).flatten(1, 2)[:, seen].float() for pool in (keys, values)
        )
        rows = q[request].float().view(keys.shape[1], -1, q.shape[2])  # [key heads, group, width]
        weights = (rows @ k.transpose(1, 2) * scale).softmax(-1).flatten(0, 1)  # [H, tokens]
        outputs.append((weights.view(values.shape[1], -1, weights.shape[1]) @ v).flatten(0, 1))
    return torch.stack(outputs).to(q.dtype)


class Attention(nn.Module):
    """Low-dimensional projected attention: q, k, v and o are each low-rank or dense (LPA paper, section 3)."""

    def __init__(self, config: LPAConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads, config.head_size
        self.scale = self.head_dim**-0.5
        one = config.architecture == "setting1"

        def project(name: Projection) -> nn.Linear | LowRankLinear:
            output = name == "o"
            bias = config.attention_bias and not output
            return projection(
                *config.projection_sizes(name),
                config.rank(name, layer),
                bias_down=one and not output,
                bias_up=(one and output) or bias,
                bias_dense=one or bias,
            )

        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (project(name) for name in PROJECTIONS)
        # A of q, k and v as one product: set by `prepare_for_inference`
        self.joint_down: nn.Module | None = None
        self.joint_ranks: list[int] = []

    def forward(
        self, x: Tensor, rotary: RotaryEmbedding | None, meta: AttentionMetadata | None, cache: LatentCache | None
    ) -> Tensor:
        """x [rows, d] with `meta` and `cache`, or [batch, T, d] without either (causal, no cache) -> same shape."""
        if meta is None or cache is None:
            return self._plain(x, rotary)
        real = len(meta.slots[0])
        q, k, v = self._first_halves(x)
        q = self._split(second_half(self.q_proj, q))
        if rotary is not None:
            q = rotary(q, meta.positions)
        keys_latent, values_latent = cache.forms[self.layer]
        k = k.unsqueeze(1) if keys_latent else self._keys(second_half(self.k_proj, k), rotary, meta.positions)
        v = v.unsqueeze(1) if values_latent else self._split(second_half(self.v_proj, v))
        cache.write(self.layer, meta.slots, k[:real], v[:real])

        parts = []  # in the order of the rows
        if meta.pairs is not None:
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
        return self.joint_down(x).split(self.joint_ranks, -1)  # type: ignore[no-any-return]

    def _plain(self, x: Tensor, rotary: RotaryEmbedding | None) -> Tensor:
        q, k, v = self._first_halves(x)
        q, v = self._split(second_half(self.q_proj, q)), self._split(second_half(self.v_proj, v))
        positions = torch.arange(x.shape[1], device=x.device)
        if rotary is not None:
            q = rotary(q, positions)
        k = self._keys(second_half(self.k_proj, k), rotary, positions)
        y: Tensor = self.o_proj(self._attend(q, k, v, None).flatten(2))
        return y

    def _decode(self, q: Tensor, rotary: RotaryEmbedding | None, pairs: DecodePairs, cache: LatentCache) -> Tensor:
        """q [requests, H, dh] -> [requests, H, dh]; absorbs B_k into the queries and B_v into the outputs."""
        keys_latent, values_latent = cache.forms[self.layer]
        keys, values = cache.keys[self.layer][pairs.blocks], cache.values[self.layer][pairs.blocks]
        if keys_latent and rotary is None:
            q = _per_kv_head(q, self._by_head(self._up(self.k_proj).weight))
        elif keys_latent:  # rotary keys are rebuilt block by block: rotation stands between the query and B_k
            rebuilt = second_half(self.k_proj, keys[:, 0])  # [n, block_size, H_kv·dh]
            keys = self._keys(rebuilt, rotary, pairs.positions).transpose(1, 2)
        out = decode_attention(q, keys, values, pairs, self.scale)
        if values_latent:
            up = self._up(self.v_proj)
            out = _per_kv_head(out, self._by_head(up.weight).transpose(1, 2))
            if up.bias is not None:  # attention weights sum to 1, so the values' bias comes through whole
                out = out + self._split(up.bias).repeat_interleave(self.heads // self.kv_heads, 0)
        return out

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
        if group.padding:
            k, v = (F.pad(x, (0, 0, 0, 0, 0, group.padding)) for x in (k, v))
        return self._attend(q, k, v, group.mask).flatten(0, 1)

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

    def _keys(self, k: Tensor, rotary: RotaryEmbedding | None, positions: Tensor) -> Tensor:
        k = self._split(k)
        return k if rotary is None else rotary(k, positions)

    def _split(self, x: Tensor) -> Tensor:
        """[..., heads·dh] -> [..., heads, dh]."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim)

    def _by_head(self, weight: Tensor) -> Tensor:
        """B [H_kv·dh, r] -> [H_kv, dh, r]."""
        return weight.view(self.kv_heads, self.head_dim, -1)

    @staticmethod
    def _up(layer: nn.Linear | LowRankLinear) -> nn.Linear:
        assert isinstance(layer, LowRankLinear), "only a low-rank projection is cached as a latent"
        return layer.up


def _per_kv_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, H, a], weight [H_kv, a, b] -> [rows, H, b]; consecutive query heads share a key-value head."""
    rows, heads, width = x.shape
    kv_heads = weight.shape[0]
    by_head = x.reshape(rows, kv_heads, -1, width).transpose(0, 1).flatten(1, 2)  # [H_kv, rows·group, a]
    return (by_head @ weight).view(kv_heads, rows, heads // kv_heads, -1).transpose(0, 1).flatten(1, 2)
