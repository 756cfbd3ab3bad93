"""Op lists with all memory that they read and write, saved when they run, to be run again on another processor.

What a record points to is read from the record itself, as csrc/records.h describes it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lpa_model.backends.cpu.args import ATTENTION, OP, OP_LIST, Dtype, Epilogue, OpKind
from lpa_model.backends.cpu.library import Kernel

LANES = 16
OP_POINTERS = ("x", "weight", "bias", "residual", "out")
ATTENTION_POINTERS = (
    *("q", "new_keys", "new_values", "keys", "values", "key_scales", "value_scales", "out", "rope", "partial", "stats"),
    *("positions", "lengths", "tables", "table_starts", "item_rows", "first_items", "counters"),
    *("prompt_positions", "prompt_slots", "shared_ends", "own_starts", "prompt_tables"),
    *("spans", "block_spans", "query_tiles", "packed_values"),
)
Record = Any  # of numpy: an element of an array with fields


@dataclass(frozen=True)
class Part:
    """Bytes that a record points to."""

    address: int
    size: int
    scratch: bool = False  # what a step leaves in it is not compared


@dataclass
class SavedStep:
    """One op list: its memory before it ran, and after."""

    regions: list[tuple[int, int]]  # (address, size), apart from each other; the first is the op list's record
    pointers: list[tuple[int, int]]  # (region, offset)
    scratch: list[Part]
    kinds: set[int]  # of operations
    before: list[bytes]
    after: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, record: int) -> SavedStep:
        """What the op list at an address needs. `after` is still empty."""
        parts, places = _walk(record)
        regions = _merged(parts)
        index = next(i for i, (start, size) in enumerate(regions) if start <= record < start + size)
        assert regions[index][0] == record
        regions.insert(0, regions.pop(index))
        pointers = []
        for place in places:
            found = next(i for i, (start, size) in enumerate(regions) if start <= place < start + size)
            pointers.append((found, place - regions[found][0]))
        [op_list] = _array(record, OP_LIST, 1)
        kinds = set(_array(op_list["ops"], OP, op_list["num_ops"])["kind"].tolist())
        return cls(regions, pointers, [part for part in parts if part.scratch], kinds, _read(regions))

    def encoded(self) -> bytes:
        """As replay.c reads it."""
        numbers = [len(self.regions), *(n for region in self.regions for n in region)]
        numbers += [len(self.pointers), *(n for pointer in self.pointers for n in pointer)]
        return np.array(numbers, dtype="<i8").tobytes() + b"".join(self.before)

    def results(self, memory: bytes) -> dict[int, np.ndarray[Any, np.dtype[np.uint8]]]:
        """Regions by their addresses, from all of them one after another, with zeros for scratch and for pointers."""
        found, at = {}, 0
        for i, (start, size) in enumerate(self.regions):
            region = np.frombuffer(memory, dtype=np.uint8, count=size, offset=at).copy()
            at += size
            for part in self.scratch:
                if start <= part.address < start + size:
                    region[part.address - start :][: part.size] = 0
            for index, offset in self.pointers:
                if index == i:
                    region[offset : offset + 8] = 0
            found[start] = region
        assert at == len(memory)
        return found

    @property
    def size(self) -> int:
        """Bytes of all regions."""
        return sum(size for _, size in self.regions)


def recording(kernels: Mapping[str, Kernel], steps: list[SavedStep]) -> dict[str, Kernel]:
    """The same kernels; op lists that run are added to `steps`."""

    def run(record: int, items: int) -> None:
        step = SavedStep.of(record)
        kernels["run_op_list"](record, items)
        step.after = _read(step.regions)
        steps.append(step)

    return {**kernels, "run_op_list": run}


def _read(regions: list[tuple[int, int]]) -> list[bytes]:
    return [ctypes.string_at(*region) for region in regions]


def _merged(parts: list[Part]) -> list[tuple[int, int]]:
    """Those that share bytes are one region; those without an address or bytes are none."""
    regions: list[tuple[int, int]] = []
    for part in sorted((part for part in parts if part.address and part.size), key=lambda part: part.address):
        if regions and part.address < sum(regions[-1]):
            start = regions[-1][0]
            regions[-1] = start, max(sum(regions[-1]), part.address + part.size) - start
        else:
            regions.append((part.address, part.size))
    return regions


def _array(address: int, dtype: Any, count: int) -> Any:
    dtype = np.dtype(dtype)
    return np.frombuffer(ctypes.string_at(int(address), dtype.itemsize * int(count)), dtype=dtype)


def _walk(record: int) -> tuple[list[Part], list[int]]:
    """What an op list's record points to, directly or not; and where the pointers themselves are."""
    [op_list] = _array(record, OP_LIST, 1)
    parts = [Part(record, OP_LIST.itemsize)]
    places = [record + OP_LIST.fields[name][1] for name in ("ops", "counters")]
    parts.append(Part(int(op_list["ops"]), OP.itemsize * int(op_list["num_ops"])))
    counters = 1 + int(op_list["num_ops"]) * (1 + int(op_list["lanes"]))
    parts.append(Part(int(op_list["counters"]), 8 * counters, scratch=True))
    attentions = set()
    for i, op in enumerate(_array(op_list["ops"], OP, op_list["num_ops"])):
        places += [int(op_list["ops"]) + i * OP.itemsize + OP.fields[name][1] for name in OP_POINTERS]
        if op["kind"] >= OpKind.ATTENTION_DECODE:
            attentions.add(int(op["x"]))
        else:
            parts += _of_op(op, int(op_list["rows"]))
    for address in sorted(attentions):
        parts.append(Part(address, ATTENTION.itemsize))
        places += [address + ATTENTION.fields[name][1] for name in ATTENTION_POINTERS]
        [attention] = _array(address, ATTENTION, 1)
        parts += _of_attention(attention)
    return parts, places


def _bytes(dtype: int) -> int:
    return {Dtype.FLOAT32: 4, Dtype.BFLOAT16: 2, Dtype.INT8: 1}[Dtype(dtype)]


def _panel_bytes(dtype: int, width: int) -> int:
    if dtype in (Dtype.FLOAT32, Dtype.BFLOAT16):
        return width * LANES * _bytes(dtype)
    groups = width // 32
    codes = groups * 32 * LANES // (2 if dtype == Dtype.INT4 else 1)
    return -(-groups * LANES * 2 // 64) * 64 + codes


def _of_op(op: Record, rows: int) -> Iterator[Part]:
    number, width, columns = _bytes(op["dtype"]), int(op["width"]), int(op["columns"])

    def matrix(name: str, row_bytes: int, stride: str) -> Part:
        return Part(int(op[name]), (rows - 1) * int(op[stride]) + row_bytes)

    if op["kind"] == OpKind.GEMM:
        panels = int(op["panels"])
        yield matrix("x", panels // int(op["group_panels"]) * width * number, "x_stride")
        yield Part(int(op["weight"]), panels * _panel_bytes(int(op["weight_dtype"]), width))
        yield Part(int(op["bias"]), panels * LANES * number)
        yield matrix("out", columns * (4 if op["epilogue"] == Epilogue.RESIDUAL_ADD else number), "out_stride")
        return
    if op["kind"] == OpKind.HEAD_RMS_NORM:
        columns = width = int(op["heads"]) * int(op["head_stride"]) // number
    yield matrix("x", width * (4 if op["kind"] == OpKind.RMS_NORM else number), "x_stride")
    yield matrix("out", columns * number, "out_stride")
    if op["kind"] == OpKind.SWIGLU:
        yield matrix("weight", width * number, "weight_stride")
        return
    yield Part(int(op["weight"]), int(op["width"]) * number)
    yield Part(int(op["bias"]), width * number)
    if op["kind"] == OpKind.ADD_LAYER_NORM:
        yield matrix("residual", width * 4, "residual_stride")


def _of_attention(a: Record) -> Iterator[Part]:
    rows, prompt_rows, heads, block_size = (int(a[n]) for n in ("rows", "prompt_rows", "heads", "block_size"))
    number, cached = _bytes(a["dtype"]), _bytes(a["cache_dtype"])
    both = rows + prompt_rows
    blocks, last_position = [0], 0

    def whole(name: str, *shape: int, size: int = 8, scratch: bool = False) -> Part:
        return Part(int(a[name]), int(np.prod(shape)) * size, scratch)

    if rows:
        items = int(a["items"])
        ends = _array(a["table_starts"], np.int64, rows) + -(-_array(a["lengths"], np.int64, rows) // block_size)
        blocks += _array(a["tables"], np.int64, ends.max()).tolist()
        last_position = int(_array(a["positions"], np.int64, rows).max())
        for name, count in (("positions", rows), ("lengths", rows), ("table_starts", rows), ("item_rows", items)):
            yield whole(name, count)
        yield whole("first_items", rows + 1)
        yield whole("tables", int(ends.max()))
        yield whole("counters", rows + 2, scratch=True)
        yield whole("partial", items, heads, int(a["value_width"]), size=4, scratch=True)
        yield whole("stats", items, 2, heads, size=4, scratch=True)
    if prompt_rows:
        spans = _array(a["spans"], np.int64, 6 * int(a["num_spans"])).reshape(-1, 6)
        end = int((spans[:, 3] + -(-(spans[:, 1] + spans[:, 2]) // block_size)).max())
        blocks += _array(a["prompt_tables"], np.int64, end).tolist()
        last_position = max(last_position, int(_array(a["prompt_positions"], np.int64, prompt_rows).max()))
        for name in ("prompt_positions", "prompt_slots", "shared_ends", "own_starts"):
            yield whole(name, prompt_rows)
        yield whole("prompt_tables", end)
        yield whole("spans", spans.size)
        yield whole("block_spans", int(a["prompt_blocks"]))
        yield whole("query_tiles", int(a["num_query_tiles"]), 2)
        packed = int(a["value_heads"]) * int(a["value_width"]) * 32 * int(a["packed_value_tiles"])
        yield whole("packed_values", packed, size=2 if a["dtype"] == Dtype.BFLOAT16 else 0, scratch=True)
    for kind in ("key", "value"):
        count, width = int(a[f"{kind}_heads"]), int(a[f"{kind}_width"])
        strided = (both - 1) * int(a[f"{kind}_stride"]) + count * width
        yield whole(f"new_{kind}s", strided, size=number)
        yield whole(f"{kind}s", max(blocks) + 1, count, block_size, width, size=cached)
        yield whole(f"{kind}_scales", max(blocks) + 1, count, block_size, size=2)
    yield whole("q", both, heads, int(a["key_width"]), size=number)
    yield whole("out", both, heads, int(a["value_width"]), size=number)
    yield whole("rope", last_position + 1, int(a["key_width"]), size=4)
