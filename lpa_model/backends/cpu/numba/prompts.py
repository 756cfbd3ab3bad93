"""Prompt rows of a program on numpy's arrays: where each of them stands, and how their attention falls into pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lpa_model.batch import Batch

COLUMNS, LOT, TOKENS = 32, 2, 32  # as in `prompt`

Hidden = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(starts, ends) [rows]: a row does not see its text's tokens from one to the other."""


@dataclass(frozen=True)
class PromptRows:
    """New tokens of some texts, one text after another."""

    positions: NDArray[np.int64]  # [rows]
    slots: NDArray[np.int64]  # [rows]: block * block_size + offset
    hidden: Hidden | None
    tables: NDArray[np.int64]  # the texts' blocks, one text after another
    spans: NDArray[np.int64]  # [texts, 6]: first row, context, length, table start, column, first block
    block_spans: NDArray[np.int64]  # [blocks]: whose each block is
    lots: NDArray[np.int64]  # [lots, 2]: text, and which tile of its queries is the first
    value_tiles: int  # of TOKENS each, that the texts' values take

    @classmethod
    def of(cls, batch: Batch) -> PromptRows:
        """The prompt rows of a step."""
        masked = None
        if any(span.is_branched for span in batch.prompts):
            starts, ends = zip(*(span.masked_range() for span in batch.prompts), strict=True)
            masked = np.concatenate(starts), np.concatenate(ends)
        return cls.build(
            [span.context for span in batch.prompts],
            [span.length for span in batch.prompts],
            [span.block_table for span in batch.prompts],
            batch.block_size,
            batch.positions[batch.num_decode :],
            batch.slots[batch.num_decode :],
            masked,
        )

    @classmethod
    def build(
        cls,
        contexts: Sequence[int],
        lengths: Sequence[int],
        tables: Sequence[Sequence[int]],
        block_size: int,
        positions: NDArray[np.int64],
        slots: NDArray[np.int64],
        hidden: Hidden | None = None,
    ) -> PromptRows:
        """`tables` cover context and length of each text, or more."""
        ends = np.asarray(contexts, dtype=np.int64) + np.asarray(lengths, dtype=np.int64)
        blocks = -(-ends // block_size)
        columns = -(-ends // TOKENS) * TOKENS

        def starts(sizes: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
            return np.cumsum([0, *sizes[:-1]])

        firsts = (starts([len(table) for table in tables]), starts(columns), starts(blocks))
        # the longest work first
        lots = sorted(
            ((i, tile) for i, length in enumerate(lengths) for tile in range(0, -(-length // COLUMNS), LOT)),
            key=lambda lot: -(contexts[lot[0]] + lot[1] * COLUMNS),
        )
        return cls(
            positions=positions,
            slots=slots,
            hidden=hidden,
            tables=np.concatenate([np.asarray(table, dtype=np.int64) for table in tables]),
            spans=np.stack((starts(lengths), contexts, lengths, *firsts), axis=1).astype(np.int64),
            block_spans=np.repeat(np.arange(len(blocks)), blocks),
            lots=np.array(lots, dtype=np.int64),
            value_tiles=int(columns.sum()) // TOKENS,
        )

    @cached_property
    def fields(self) -> dict[str, int]:
        """What a call says of them."""
        shared_ends, own_starts = self.hidden or (None, None)
        return {
            "prompt_positions": self.positions.ctypes.data,
            "prompt_slots": self.slots.ctypes.data,
            "shared_ends": 0 if shared_ends is None else shared_ends.ctypes.data,
            "own_starts": 0 if own_starts is None else own_starts.ctypes.data,
            "prompt_tables": self.tables.ctypes.data,
            "spans": self.spans.ctypes.data,
            "block_spans": self.block_spans.ctypes.data,
            "lots": self.lots.ctypes.data,
            "prompt_rows": len(self.positions),
            "num_spans": len(self.spans),
            "prompt_blocks": len(self.block_spans),
            "prompt_lots": len(self.lots),
            "value_tiles_in_row": self.value_tiles,
        }


NO_PROMPTS = dict.fromkeys(("prompt_rows", "num_spans", "prompt_blocks", "prompt_lots"), 0)
