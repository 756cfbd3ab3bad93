"""The rows of a step as tensors on the device, all of which arrive in one copy.

A step of generated tokens alone has static buffers (`StepBuffers`): a captured graph reads them at the same addresses
in every replay. Any other step's tensors are made for it (`step_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpa_model.backends.cuda.transfer import Parcel
from lpa_model.batch import Batch, Span

PROMPT_TILE = 64
"""Prompt rows that one program of the attention computes."""

Ints32 = NDArray[np.int32]


@dataclass(frozen=True)
class Decodes:
    """Generated tokens: one row each."""

    lengths: Tensor  # int32 [m]: tokens that the row sees, itself included; 0: a padding row, whose result is zeros
    tables: Tensor  # int32 [m, width]: blocks of its sequence; what lies behind its length is not read


@dataclass(frozen=True)
class Prompts:
    """Prompt rows, span after span."""

    rows: int
    spans: Tensor  # int32 [n, 3]: first row, tokens before it, new tokens
    tables: Tensor  # int32 [n, width]: blocks of each span's sequence
    places: Tensor  # int32 [n, width]: of the same blocks in `blocks`
    blocks: Tensor  # int32 [blocks]: of all spans, one after another
    key_positions: Tensor  # int32 [blocks · block_size]: of their tokens, 0 behind the last
    hidden: Tensor  # int32 [rows, 2]: each row sees all tokens up to itself except those from .. up to ..
    tiles: Tensor  # int32 [tiles, 2]: span, and first of at most PROMPT_TILE rows within it


@dataclass(frozen=True)
class Rows:
    """All rows of a step, decode rows first."""

    ids: Tensor  # int32 [rows]
    positions: Tensor  # int32 [rows]
    slots: Tensor  # int32 [rows]: block · block_size + offset, where keys and values are written; -1: nowhere
    decodes: Decodes | None
    prompts: Prompts | None

    @property
    def num_decode(self) -> int:
        """Decode rows, padding included."""
        return 0 if self.decodes is None else len(self.decodes.lengths)


class StepBuffers:
    """Static tensors for steps of up to `capacity` decode rows, whose tables have up to `max_blocks` blocks.

    Rows behind a batch's are padding: they see nothing and write nothing.
    """

    def __init__(self, capacity: int, max_blocks: int, device: torch.device) -> None:
        self.capacity, self.max_blocks = capacity, max_blocks
        self._flat = torch.zeros(5 * _aligned(capacity) + capacity * max_blocks, dtype=torch.int32, device=device)
        ids, positions, slots, lengths, self.carried, tables = _parts(self._flat, capacity, max_blocks)
        slots.fill_(-1)
        self.carried.fill_(-1)
        self.rows = Rows(ids, positions, slots, Decodes(lengths, tables), None)

    def fill(self, batch: Batch) -> None:
        """Lay out a batch of decode rows alone, at most `capacity`, and begin its copy to the device."""
        assert batch.num_rows == batch.num_decode <= self.capacity
        # pinned memory of its own: an earlier copy may still wait for its step; torch keeps it until it is done
        host = torch.zeros(len(self._flat), dtype=torch.int32, pin_memory=self._flat.is_cuda)
        parts = (part.numpy() for part in _parts(host, self.capacity, self.max_blocks))
        ids, positions, slots, lengths, carried, tables = parts
        n = batch.num_rows
        slots[n:] = -1
        carried[:] = -1
        if batch.carried is not None:
            carried[:n] = batch.carried
        ids[:n], positions[:n], slots[:n] = batch.ids, batch.positions, batch.slots
        _fill_decodes(batch.spans, lengths, tables)
        self._flat.copy_(host, non_blocking=True)


def step_rows(batch: Batch, device: torch.device, sampled: Tensor | None = None) -> Rows:
    """Any batch's rows on the device; memory is allocated for them. `sampled`: as for `take_carried`."""
    parcel = Parcel()
    decodes, prompts = batch.spans[: batch.num_decode], batch.prompts
    own = [parcel.add(array.astype(np.int32)) for array in (batch.ids, batch.positions, batch.slots)]
    if batch.carried is not None:
        own.append(parcel.add(batch.carried.astype(np.int32)))
    of_decodes: list[int] = []
    if decodes:
        lengths = np.zeros(len(decodes), dtype=np.int32)
        tables = np.zeros((len(decodes), _most_blocks(decodes, batch.block_size)), dtype=np.int32)
        _fill_decodes(decodes, lengths, tables)
        of_decodes = [parcel.add(lengths), parcel.add(tables)]
    arrays = _prompt_arrays(prompts, batch.block_size) if prompts else {}
    of_prompts = {name: parcel.add(array) for name, array in arrays.items()}
    there = parcel.send(device)
    ids, positions, slots, *carried = (there[place] for place in own)
    if carried:
        assert sampled is not None, "ids come from a step of a backend that is warm"
        take_carried(ids, carried[0], sampled)
    found = Decodes(*(there[place] for place in of_decodes)) if decodes else None
    rest = {name: there[place] for name, place in of_prompts.items()}
    rows = batch.num_rows - batch.num_decode
    return Rows(ids, positions, slots, found, Prompts(rows, **rest) if prompts else None)


def take_carried(ids: Tensor, carried: Tensor, sampled: Tensor) -> None:
    """Write ids int32 [rows] that the step before has sampled, numbers [n], where `carried` int32 [rows] names one of
    them. One that is no token (negative) becomes 0: that row's result is discarded."""
    taken = sampled.index_select(0, carried.clamp_min(0)).clamp_min(0).to(torch.int32)
    ids.copy_(torch.where(carried >= 0, taken, ids))


def _parts(flat: Tensor, rows: int, max_blocks: int) -> tuple[Tensor, ...]:
    *columns, tables = flat.split([_aligned(rows)] * 5 + [rows * max_blocks])
    return *(column[:rows] for column in columns), tables.view(rows, max_blocks)


def _aligned(numbers: int) -> int:
    """So many that 16 bytes begin behind them: a kernel is compiled again for a pointer of less alignment."""
    return -(-numbers // 4) * 4


def _fill_decodes(spans: Sequence[Span], lengths: Ints32, tables: Ints32) -> None:
    n, width = len(spans), tables.shape[1]
    lengths[:n] = [span.context + 1 for span in spans]
    used = [len(span.block_table) for span in spans]
    if used and max(used) == min(used) <= width:  # one assignment is quicker than one for each row
        tables[:n, : used[0]] = [span.block_table for span in spans]
        return
    for i, span in enumerate(spans):
        blocks = span.block_table[:width]
        tables[i, : len(blocks)] = blocks


def _most_blocks(spans: Sequence[Span], block_size: int) -> int:
    return max(-(-(span.context + span.length) // block_size) for span in spans)


def _prompt_arrays(spans: Sequence[Span], block_size: int) -> dict[str, Ints32]:
    """Those of `Prompts`, by name."""
    width = _most_blocks(spans, block_size)
    tables = np.zeros((len(spans), width), dtype=np.int32)
    places = np.zeros((len(spans), width), dtype=np.int32)
    rows, blocks, positions, hidden, tiles = [], [], [], [], []
    first = place = 0
    for i, span in enumerate(spans):
        used = -(-(span.context + span.length) // block_size)
        tables[i, :used] = span.block_table[:used]
        places[i, :used] = np.arange(place, place + used)
        blocks.append(tables[i, :used])
        positions.append(np.pad(span.positions(), (0, used * block_size - span.context - span.length)))
        hidden.append(np.stack(span.masked_range(), axis=1))
        tiles += [(i, start) for start in range(0, span.length, PROMPT_TILE)]
        rows.append((first, span.context, span.length))
        first, place = first + span.length, place + used
    arrays = {
        "spans": np.array(rows),
        "tables": tables,
        "places": places,
        "blocks": np.concatenate(blocks),
        "key_positions": np.concatenate(positions),
        "hidden": np.concatenate(hidden),
        "tiles": np.array(tiles),
    }
    return {name: array.astype(np.int32) for name, array in arrays.items()}
