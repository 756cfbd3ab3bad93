"""Decode attention by the compiled kernel, on torch's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lpa_model.batch import Batch

TILE_TOKENS = 128  # at most, in whole blocks: what one thread attends to at a time


@dataclass(frozen=True)
class DecodeRows:
    """Queries of a step and the cache blocks that each attends to, cut into tiles at multiples of a fixed length."""

    positions: NDArray[np.int64]  # [rows]
    lengths: NDArray[np.int64]  # [rows]: tokens to attend to, the query's own included
    tables: NDArray[np.int64]  # the rows' blocks, one row after another
    table_starts: NDArray[np.int64]  # [rows]
    item_rows: NDArray[np.int64]  # [items]
    first_items: NDArray[np.int64]  # [rows + 1]
    tile_blocks: int

    @cached_property
    def fields(self) -> dict[str, int]:
        """What a call says of them."""
        names = ("positions", "lengths", "tables", "table_starts", "item_rows", "first_items")
        addresses = {name: getattr(self, name).ctypes.data for name in names}
        sizes = {"rows": len(self.lengths), "items": len(self.item_rows), "tile_blocks": self.tile_blocks}
        return addresses | sizes

    @property
    def num_counters(self) -> int:
        """int64 that a call counts in."""
        return 1 + len(self.lengths) + 1

    @classmethod
    def of(cls, batch: Batch) -> DecodeRows:
        """The decode rows of a step."""
        spans = batch.spans[: batch.num_decode]
        lengths = np.array([span.context + 1 for span in spans])
        positions = batch.positions[: batch.num_decode]
        return cls.build(positions, lengths, [span.block_table for span in spans], batch.block_size)

    @classmethod
    def build(
        cls, positions: NDArray[np.int64], lengths: NDArray[np.int64], tables: Sequence[Sequence[int]], block_size: int
    ) -> DecodeRows:
        """`tables` cover `lengths` tokens, or more."""
        tile_blocks = max(1, TILE_TOKENS // block_size)
        items = -(-lengths // (tile_blocks * block_size))
        sizes = np.array([len(table) for table in tables])
        return cls(
            positions=positions,
            lengths=lengths,
            tables=np.concatenate([np.asarray(table, dtype=np.int64) for table in tables]),
            table_starts=np.cumsum(sizes) - sizes,
            item_rows=np.repeat(np.arange(len(lengths)), items),
            first_items=np.concatenate(([0], np.cumsum(items))),
            tile_blocks=tile_blocks,
        )


def call_of_layer(
    q: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    scale: float,
    *,
    turns: Tensor | None,
    up: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> dict[str, int | float]:
    """What a call says of a layer, with the arguments of `decode_attention` and the tensor of its result."""
    _, heads, key_width = q.shape
    _, key_heads, block_size, _ = keys.shape
    _, value_heads, _, value_width = values.shape
    up_heads, up_width = (0, 0) if up is None else up.shape[:2]
    assert q.is_contiguous() and keys.is_contiguous() and values.is_contiguous() and out.is_contiguous()
    return {
        "q": q.data_ptr(),
        "new_keys": new_keys.data_ptr(),
        "new_values": new_values.data_ptr(),
        "keys": keys.data_ptr(),
        "values": values.data_ptr(),
        "up": 0 if up is None else up.data_ptr(),
        "up_bias": 0 if up_bias is None else up_bias.data_ptr(),
        "out": out.data_ptr(),
        "turns": 0 if turns is None else turns.data_ptr(),
        "heads": heads,
        "key_heads": key_heads,
        "value_heads": value_heads,
        "up_heads": up_heads,
        "key_width": key_width,
        "value_width": value_width,
        "up_width": up_width,
        "key_stride": new_keys.stride(0),
        "value_stride": new_values.stride(0),
        "block_size": block_size,
        "key_tiles": heads <= 16 and key_heads == 1 and turns is None and block_size % 64 == 0,
        "value_tiles": heads <= 16 and value_heads == 1,
        "scale": scale,
    }


def scratch_of_step(partial: Tensor, size: int) -> dict[str, int]:
    """What a call says of its scratch float32: `size` numbers of partial results, and what belongs to them behind."""
    return {"partial": partial.data_ptr(), "stats": partial.data_ptr() + 4 * size}
