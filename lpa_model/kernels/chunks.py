"""Prompt rows of a program on numpy's arrays: where each of them stands, and how their attention falls into pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

LANES, LOT, VALUES = 16, 4, 32  # as in `prompt`


@dataclass(frozen=True)
class ChunkRows:
    """New tokens of some texts, one text after another."""

    positions: NDArray[np.int64]  # [rows]
    slots: NDArray[np.int64]  # [rows]: block * block_size + offset
    tables: NDArray[np.int64]  # the texts' blocks, one text after another
    spans: NDArray[np.int64]  # [texts, 6]: first row, context, length, table start, column, first block
    block_spans: NDArray[np.int64]  # [blocks]: whose each block is
    lots: NDArray[np.int64]  # [lots, 2]: text, and which tile of its queries is the first
    longest: int  # context and length together
    columns: int  # that values take

    @classmethod
    def build(
        cls, contexts: Sequence[int], lengths: Sequence[int], tables: Sequence[Sequence[int]], block_size: int
    ) -> ChunkRows:
        """`tables` cover context and length of each text, or more."""
        spans, slots, row, column, start, first = [], [], 0, 0, 0, 0
        for context, length, table in zip(contexts, lengths, tables, strict=True):
            spans.append((row, context, length, start, column, first))
            index = np.arange(context, context + length)
            slots.append(np.asarray(table, dtype=np.int64)[index // block_size] * block_size + index % block_size)
            row, start = row + length, start + len(table)
            column += -(-(context + length) // VALUES) * VALUES
            first += -(-(context + length) // block_size)
        blocks = [-(-(context + length) // block_size) for context, length in zip(contexts, lengths, strict=True)]
        # the longest work first
        lots = sorted(
            ((i, tile) for i, length in enumerate(lengths) for tile in range(0, -(-length // LANES), LOT)),
            key=lambda lot: -(contexts[lot[0]] + lot[1] * LANES),
        )
        return cls(
            positions=np.concatenate([np.arange(c, c + n) for c, n in zip(contexts, lengths, strict=True)]),
            slots=np.concatenate(slots),
            tables=np.concatenate([np.asarray(table, dtype=np.int64) for table in tables]),
            spans=np.array(spans, dtype=np.int64),
            block_spans=np.repeat(np.arange(len(blocks)), blocks),
            lots=np.array(lots, dtype=np.int64),
            longest=max(context + length for context, length in zip(contexts, lengths, strict=True)),
            columns=column,
        )

    @cached_property
    def fields(self) -> dict[str, int]:
        """What a call says of them."""
        return {
            "prompt_positions": self.positions.ctypes.data,
            "prompt_slots": self.slots.ctypes.data,
            "prompt_tables": self.tables.ctypes.data,
            "spans": self.spans.ctypes.data,
            "block_spans": self.block_spans.ctypes.data,
            "lots": self.lots.ctypes.data,
            "prompt_rows": len(self.positions),
            "num_spans": len(self.spans),
            "prompt_blocks": len(self.block_spans),
            "prompt_lots": len(self.lots),
        }


NO_CHUNKS = dict.fromkeys(("prompt_rows", "num_spans", "prompt_blocks", "prompt_lots"), 0)
