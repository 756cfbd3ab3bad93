"""Token files: a text's ids, to be memory-mapped.

A file is in safetensors' format, with one tensor `tokens`, uint16 or uint32 [N]. Its metadata say what it is of:
`tokenizer` (a hash), `documents`, `bytes` (of the text), `end_of_text` (the token between documents), `sources` (names
and sizes of the files).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lpa_model.train.tokenizer import TokenIds, encode_pieces, id_type

DTYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4")}


@dataclass(frozen=True)
class Tokens:
    """A text as token ids [N]. `num_bytes` is its length in UTF-8, end-of-text tokens of JSONL not counted."""

    ids: TokenIds
    num_bytes: int
    documents: int
    end_of_text: int
    sources: tuple[str, ...] = ()

    @property
    def nats_per_bit(self) -> float:
        """Nats per token of what is one bit per byte of this text."""
        return math.log(2) * self.num_bytes / len(self.ids)


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """16 bytes in hexadecimal, of all that a tokenizer.json says."""
    return hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16).hexdigest()


def source_of(path: Path) -> str:
    """A file's name and size."""
    return f"{path.name} ({path.stat().st_size:,} bytes)"


def write_tokens(
    path: Path, tokenizer: Tokenizer, pieces: Iterable[str], end_of_text: str, sources: tuple[str, ...] = ()
) -> Tokens:
    """Encode pieces of text into the token file `path`, which appears whole; memory holds a few pieces."""
    end = tokenizer.token_to_id(end_of_text)
    assert end is not None
    stored = f"U{8 * id_type(tokenizer).itemsize}"
    count = ends = num_bytes = 0
    last = end

    def counted() -> Iterable[str]:
        nonlocal num_bytes
        for piece in pieces:
            num_bytes += len(piece.encode()) if piece != end_of_text else 0
            yield piece

    def header() -> bytes:
        metadata = {
            "tokenizer": tokenizer_hash(tokenizer),
            "documents": str(ends + (last != end)),
            "bytes": str(num_bytes),
            "end_of_text": str(end),
            "sources": json.dumps(sources),
        }
        tensor = {"dtype": stored, "shape": [count], "data_offsets": [0, count * DTYPES[stored].itemsize]}
        return json.dumps({"__metadata__": metadata, "tokens": tensor}).encode()

    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        space = len(header()) + 5 * 20  # the numbers grow to 20 digits at most
        space += -space % 8
        file.write(space.to_bytes(8, "little") + b" " * space)
        for ids in encode_pieces(tokenizer, counted()):
            file.write(ids.astype(DTYPES[stored]).tobytes())
            count += len(ids)
            ends += int((ids == end).sum())
            last = int(ids[-1]) if len(ids) else last
        file.seek(8)
        file.write(header())
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    return read_tokens(path, tokenizer)


def read_tokens(path: Path, tokenizer: Tokenizer) -> Tokens:
    """A token file, its ids memory-mapped.

    Raises:
        ValueError: the file is truncated, of another kind, or of another tokenizer's ids; the message names it.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= size else b""
    try:
        header: dict[str, Any] = json.loads(text)
        metadata, tensor = header.pop("__metadata__"), header.pop("tokens")
        dtype, (count,) = DTYPES[tensor["dtype"]], tensor["shape"]
        found, sources = metadata["tokenizer"], tuple(json.loads(metadata["sources"]))
        num_bytes, documents, end = (int(metadata[name]) for name in ("bytes", "documents", "end_of_text"))
        if header or tensor["data_offsets"] != [0, count * dtype.itemsize]:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: truncated, or not a file of tokens") from error
    if (expected := 8 + length + count * dtype.itemsize) != size:
        raise ValueError(f"{path}: truncated: has {size:,} bytes, and its header speaks of {expected:,}")
    if found != tokenizer_hash(tokenizer):
        raise ValueError(f"{path}: holds tokens of another tokenizer; tokenize the text again, with this one")
    ids: TokenIds = np.memmap(path, dtype, "r", 8 + length, (count,)) if count else np.zeros(0, dtype)
    return Tokens(ids, num_bytes, documents, end, sources)
