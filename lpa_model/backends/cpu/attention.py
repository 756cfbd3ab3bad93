"""Attention over the paged cache by the C kernels: what their records say of a layer, and of a step's rows.

The kernels are `csrc/attention_decode.c` and `csrc/attention_prompt.c`; which op runs when is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpa_model.backends.cpu.args import ATTENTION, Dtype
from lpa_model.backends.cpu.library import Kernel
from lpa_model.backends.cpu.oplist import DTYPES, OpList
from lpa_model.batch import Batch

SPLIT_TOKENS = 128  # at most, in whole blocks: a work item of decode attention
QUERY_TILE, ITEM_TILES, PACKED_TOKENS = 32, 2, 32  # as in csrc/attention_prompt.c
MaskedRange = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(shared_ends, own_starts) [rows]: a row does not see its text's tokens from one to the other."""


@dataclass(frozen=True)
class DecodeRows:
    """Single queries of a step and the cache blocks that each attends to, split into work items (split-KV).

    The splits are at multiples of a fixed length, so that they follow from a row's length alone.
    """

    positions: NDArray[np.int64]  # [rows]
    lengths: NDArray[np.int64]  # [rows]: tokens to attend to, the query's own included
    tables: NDArray[np.int64]  # block tables, one row after another
    table_starts: NDArray[np.int64]  # [rows]
    item_rows: NDArray[np.int64]  # [items]
    first_items: NDArray[np.int64]  # [rows + 1]
    split_blocks: int  # blocks of a work item

    @classmethod
    def of(cls, batch: Batch) -> DecodeRows:
        """The decode rows of a step."""
        spans = batch.spans[: batch.num_decode]
        lengths = np.array([span.context + 1 for span in spans])
        tables = [span.block_table for span in spans]
        return cls.build(batch.positions[: batch.num_decode], lengths, tables, batch.block_size)

    @classmethod
    def build(
        cls, positions: NDArray[np.int64], lengths: NDArray[np.int64], tables: Sequence[Sequence[int]], block_size: int
    ) -> DecodeRows:
        """`tables` cover `lengths` tokens, or more."""
        split_blocks = max(1, SPLIT_TOKENS // block_size)
        items = -(-lengths // (split_blocks * block_size))
        sizes = np.array([len(table) for table in tables], dtype=np.int64)
        return cls(
            positions=np.ascontiguousarray(positions, dtype=np.int64),
            lengths=np.ascontiguousarray(lengths, dtype=np.int64),
            tables=np.concatenate([np.asarray(table, dtype=np.int64) for table in tables]),
            table_starts=np.cumsum(sizes) - sizes,
            item_rows=np.repeat(np.arange(len(lengths)), items),
            first_items=np.concatenate(([0], np.cumsum(items))),
            split_blocks=split_blocks,
        )

    @cached_property
    def fields(self) -> dict[str, int]:
        """What a record says of them; they have to live until the kernel has run."""
        names = ("positions", "lengths", "tables", "table_starts", "item_rows", "first_items")
        addresses = {name: getattr(self, name).ctypes.data for name in names}
        sizes = {"rows": len(self.lengths), "items": len(self.item_rows), "split_blocks": self.split_blocks}
        return addresses | sizes

    @property
    def num_counters(self) -> int:
        """int64 that each layer counts in, zeros before it begins."""
        return 1 + len(self.lengths) + 1

    def scratch_floats(self, heads: int, value_width: int) -> int:
        """float32 of scratch that layers need one after another, see `scratch_fields`."""
        return len(self.item_rows) * heads * (value_width + 2)

    def scratch_fields(self, scratch: Tensor, heads: int, value_width: int) -> dict[str, int]:
        """What a record says of `scratch` float32 [scratch_floats]."""
        start = scratch.data_ptr()
        return {"partial": start, "stats": start + 4 * len(self.item_rows) * heads * value_width}


@dataclass(frozen=True)
class PromptRows:
    """New tokens of some texts, one text after another, whose earlier tokens are in the cache."""

    positions: NDArray[np.int64]  # [rows]
    slots: NDArray[np.int64]  # [rows]: block * block_size + offset
    masked_range: MaskedRange | None
    tables: NDArray[np.int64]  # block tables, one text after another
    spans: NDArray[np.int64]  # [texts, 6]: first row, context, length, table start, first packed token, first block
    block_spans: NDArray[np.int64]  # [blocks]: the text of each block
    query_tiles: NDArray[np.int64]  # [work items of a head, 2]: text, and its first tile of queries
    packed_tiles: int  # of PACKED_TOKENS each, that the texts' values take

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
        masked_range: MaskedRange | None = None,
    ) -> PromptRows:
        """`tables` cover context and length of each text, or more."""
        ends = np.asarray(contexts, dtype=np.int64) + np.asarray(lengths, dtype=np.int64)
        blocks = -(-ends // block_size)
        packed = -(-ends // PACKED_TOKENS) * PACKED_TOKENS

        def starts(sizes: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
            return np.cumsum([0, *sizes[:-1]])

        firsts = (starts([len(table) for table in tables]), starts(packed), starts(blocks))
        # the longest work first
        items = sorted(
            ((i, tile) for i, length in enumerate(lengths) for tile in range(0, -(-length // QUERY_TILE), ITEM_TILES)),
            key=lambda item: -(contexts[item[0]] + item[1] * QUERY_TILE),
        )
        return cls(
            positions=np.ascontiguousarray(positions, dtype=np.int64),
            slots=np.ascontiguousarray(slots, dtype=np.int64),
            masked_range=masked_range,
            tables=np.concatenate([np.asarray(table, dtype=np.int64) for table in tables]),
            spans=np.stack((starts(lengths), contexts, lengths, *firsts), axis=1).astype(np.int64),
            block_spans=np.repeat(np.arange(len(blocks)), blocks),
            query_tiles=np.array(items, dtype=np.int64),
            packed_tiles=int(packed.sum()) // PACKED_TOKENS,
        )

    @cached_property
    def fields(self) -> dict[str, int]:
        """What a record says of them; they have to live until the kernel has run."""
        shared_ends, own_starts = self.masked_range or (None, None)
        return {
            "prompt_positions": self.positions.ctypes.data,
            "prompt_slots": self.slots.ctypes.data,
            "shared_ends": 0 if shared_ends is None else shared_ends.ctypes.data,
            "own_starts": 0 if own_starts is None else own_starts.ctypes.data,
            "prompt_tables": self.tables.ctypes.data,
            "spans": self.spans.ctypes.data,
            "block_spans": self.block_spans.ctypes.data,
            "query_tiles": self.query_tiles.ctypes.data,
            "prompt_rows": len(self.positions),
            "num_spans": len(self.spans),
            "prompt_blocks": len(self.block_spans),
            "num_query_tiles": len(self.query_tiles),
            "packed_value_tiles": self.packed_tiles,
        }

    def packed_numbers(self, value_heads: int, value_width: int) -> int:
        """bfloat16 of `packed_values`, scratch that layers need one after another."""
        return value_heads * value_width * self.packed_tiles * PACKED_TOKENS


NO_DECODES = {"rows": 0, "items": 0}
NO_PROMPTS = dict.fromkeys(("prompt_rows", "num_spans", "prompt_blocks", "num_query_tiles"), 0)


def layer_fields(
    q: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    scale: float,
    *,
    rope: Tensor | None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> dict[str, int | float]:
    """What a record says of a layer. Tensors have one dtype, float32 or bfloat16; or the pools are int8, with scales.

    Args:
        q: [rows, H, key width], decode rows before prompt rows; heads side by side.
        new_keys: [rows, key heads * key width], the step's own; a slice of a wider tensor will do.
        new_values: [rows, value heads * value width]; likewise.
        keys: the pool [blocks, key heads, block_size, key width]; query heads are consecutive per key head.
        values: the pool [blocks, value heads, block_size, value width]; in bfloat16 its numbers lie in the VNNI layout
            [blocks, value heads, block_size / 2, value width, 2], see `to_vnni`.
        out: [rows, H, value width]; likewise.
        scale: factor on the scores, 1/sqrt(dh).
        rope: complex64 [positions, key width / 2], cos + i sin of rotary positions whose pairs are neighbours: applied
            to queries and new keys.
        key_scales: of an int8 pool, bfloat16 [blocks, key heads, block_size].
        value_scales: of an int8 pool, bfloat16 [blocks, value heads, block_size].

    Raises:
        ValueError: a shape or dtype that the kernels do not take. Widths have to be multiples of 16 in float32, of 32
            in bfloat16.
    """
    is_bf16 = q.dtype is torch.bfloat16
    _, heads, key_width = q.shape
    _, key_heads, block_size, _ = keys.shape
    value_heads, value_width = values.shape[1], values.shape[3]
    unit = 32 if is_bf16 else 16
    if key_width % unit or value_width % unit or block_size % 2:
        raise ValueError(f"key width {key_width} and value width {value_width} have to be multiples of {unit}")
    if heads % key_heads or heads % value_heads or out.shape[1:] != (heads, value_width):
        raise ValueError(f"shapes that do not fit: q {q.shape}, keys {keys.shape}, values {values.shape}")
    scales = [pool for pool in (key_scales, value_scales) if pool is not None]
    if any(x.dtype is not q.dtype for x in (new_keys, new_values, out)) or q.dtype not in DTYPES:
        raise ValueError(f"dtypes other than q's, {q.dtype}, or neither float32 nor bfloat16")
    cache_dtype = torch.int8 if scales else q.dtype
    if keys.dtype is not cache_dtype or values.dtype is not cache_dtype:
        raise ValueError(f"pools of {keys.dtype} and {values.dtype}, not {cache_dtype}")
    if scales and [(x.dtype, x.shape) for x in scales] != [(torch.bfloat16, x.shape[:3]) for x in (keys, values)]:
        raise ValueError(f"scales {[(x.dtype, list(x.shape)) for x in scales]} are not those of both pools")
    side_by_side = all(x[:1].is_contiguous() for x in (q, new_keys, new_values, out))
    if not (side_by_side and all(x.is_contiguous() for x in (keys, values, *scales))):
        raise ValueError("pools that are not contiguous, or rows whose numbers are not side by side")
    if rope is not None and (rope.dtype is not torch.complex64 or rope.shape[1] * 2 != key_width):
        raise ValueError(f"rope {rope.dtype} {rope.shape}, not complex64 [.., {key_width // 2}]")
    return {
        "dtype": DTYPES[q.dtype],
        "cache_dtype": Dtype.INT8 if scales else DTYPES[q.dtype],
        "q": q.data_ptr(),
        "new_keys": new_keys.data_ptr(),
        "new_values": new_values.data_ptr(),
        "keys": keys.data_ptr(),
        "values": values.data_ptr(),
        "key_scales": 0 if key_scales is None else key_scales.data_ptr(),
        "value_scales": 0 if value_scales is None else value_scales.data_ptr(),
        "out": out.data_ptr(),
        "rope": 0 if rope is None else rope.data_ptr(),
        "heads": heads,
        "key_heads": key_heads,
        "value_heads": value_heads,
        "key_width": key_width,
        "value_width": value_width,
        "query_stride": q.stride(0),
        "key_stride": new_keys.stride(0),
        "value_stride": new_values.stride(0),
        "out_stride": out.stride(0),
        "block_size": block_size,
        "scale": scale,
    }


def attend(
    kernels: Mapping[str, Kernel],
    dtype: torch.dtype,
    layer: Mapping[str, int | float],
    decodes: DecodeRows | None,
    prompts: PromptRows | None,
) -> None:
    """One layer's attention by itself: the step's own keys and values into the cache, and `out` of all rows.

    A row's result depends on nothing but the row: not on the others, its chunk, nor on the number of threads. `layer`
    is from `layer_fields`, whose rows have `dtype`; decode rows come first.
    """
    heads, value_heads, width = (int(layer[name]) for name in ("heads", "value_heads", "value_width"))
    record = np.zeros(1, dtype=ATTENTION)
    fields = dict(layer)
    alive: list[object] = []
    if decodes is not None:
        scratch = torch.empty(decodes.scratch_floats(heads, width))
        counters = np.zeros(decodes.num_counters, dtype=np.int64)
        fields |= decodes.fields | decodes.scratch_fields(scratch, heads, width) | {"counters": counters.ctypes.data}
        alive += [scratch, counters]
    if prompts is not None:
        packed = torch.empty(prompts.packed_numbers(value_heads, width), dtype=torch.bfloat16)
        fields |= prompts.fields | {"packed_values": packed.data_ptr()}
        alive.append(packed)
    for name, value in fields.items():
        record[name] = value
    op_list = OpList(kernels, dtype, record)
    op_list.attention()
    op_list.run(int(record["rows"][0] + record["prompt_rows"][0]))
    del alive


def to_vnni(values: Tensor) -> Tensor:
    """[.., block_size, width] -> [.., block_size / 2, width, 2]: two neighbouring tokens' numbers side by side."""
    paired: Tensor = values.unflatten(-2, (-1, 2))
    return paired.transpose(-1, -2).contiguous()


def from_vnni(values: Tensor) -> Tensor:
    """The inverse of `to_vnni`."""
    return values.transpose(-1, -2).flatten(-3, -2).contiguous()
