"""Decode attention in plain torch: single queries over a paged cache that is read where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class DecodePairs:
    """Decode queries spread over (request, block) pairs; pair i belongs to query row `row[i]`.

    The cache is read as `pool[blocks]`: a view of the pool's low end where most of it is in use, else a copy of
    the blocks named. Each of those n blocks has `multiplicity` query slots; pair i is at `slot[i]` of n·m.
    """

    row: Tensor  # [pairs] int64
    slot: Tensor  # [pairs] int64
    blocks: slice | Tensor
    multiplicity: int
    beyond: Tensor  # [n·m, 1, block_size] bool: keys of the block that the query must not see
    positions: Tensor  # [n, block_size] int64: absolute positions of the keys in each block that queries see


def decode_pairs(
    tokens: NDArray[np.int64], tables: Sequence[Sequence[int]], block_size: int, device: torch.device
) -> DecodePairs:
    """Pairs of queries that see `tokens` [requests] tokens each, in the blocks of their `tables`."""

    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    per_row = -(-tokens // block_size)  # blocks of each request
    row = np.repeat(np.arange(len(tokens)), per_row)
    block = np.concatenate([np.asarray(table[:n]) for table, n in zip(tables, per_row, strict=True)])
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


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, pairs: DecodePairs, scale: float) -> Tensor:
    """Attention of single queries over paged keys and values, without a copy of either.

    The queries are gathered to (request, block) pairs, one product over the blocks gives every pair its own
    softmax, and the pairs of a request are merged by their maxima and sums in the order of the blocks.

    Args:
        q: [requests, H, key width], in the cache's dtype.
        keys: [n, key heads, block_size, key width], `pool[pairs.blocks]`; query heads are consecutive per key head.
        values: [n, value heads, block_size, value width].
        pairs: which queries attend to which blocks.
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
    """[n·m, H, width] -> [n, heads, m·H/heads, width]: the query rows of each of the pool's heads."""
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
