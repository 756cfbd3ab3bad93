"""A converted model written as it is read: a few rows at a time, so that memory holds a part of one tensor.

What is written stands in a folder beside the destination, `.NAME.partial`, until it is whole. A conversion that was
killed goes on from there; one that finds bad input takes the folder away.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lpa_model.checkpoint import check_finite
from lpa_model.config import LPAConfig
from lpa_model.folder import CheckpointError
from lpa_model.model import without_weights

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""dtypes of weights as safetensors calls them."""
PART = 1 << 22  # numbers that are read and written at a time
WEIGHTS = "model.safetensors"
SOURCE = "source.json"  # in a partial folder: what it is made of

Progress = Callable[[int, int], None]
"""Called with the bytes written so far, and all."""


@dataclass(frozen=True)
class Stored:
    """A tensor where it is stored, under the name that it has there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # of what `parts` yields
    parts: Callable[[], Iterator[Tensor]]  # its rows from the first to the last, some at a time


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """The first axis in blocks of about PART numbers."""
    rows = max(1, PART // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def write_model(
    dst: Path,
    config: LPAConfig,
    tensors: Mapping[str, Stored],
    tokenizer: Tokenizer,
    files: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the native folder `dst`, which must not exist or be empty; it appears whole or not at all.

    Args:
        tensors: by our names; a tied head is left out.
        files: texts of further files, as tokenizer_config.json.
        dtype: of the weights written; None keeps that of each tensor.

    Raises:
        CheckpointError: `dst` has something in it or another conversion writes it, or a tensor is missing, of the wrong
            shape or not finite; the message names it.
    """
    check_free(dst)
    check_complete(config, tensors)
    check_tokenizer(config, tokenizer)
    dst = dst.resolve()
    partial = dst.with_name(f".{dst.name}.partial")
    dst.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir(exist_ok=True)
        with (partial / f"{WEIGHTS}.new").open("ab") as file:
            _lock(file, dst)
            _begin(partial, file, _identity(config, tensors, dtype))
            _write_weights(file, config, tensors, dtype, progress)
            texts = {
                "config.json": json.dumps(config.to_dict(), indent=2) + "\n",
                "tokenizer.json": tokenizer.to_str(),
                **files,
            }
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            Path(file.name).replace(partial / WEIGHTS)
            (partial / SOURCE).unlink()
            partial.replace(dst)
    except _Taken:
        raise
    except Exception:  # but not KeyboardInterrupt: what was written is gone on from
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_free(dst: Path) -> None:
    """Raises CheckpointError where something is in the way of a new folder `dst`."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"{dst}: exists already")


def check_complete(config: LPAConfig, tensors: Mapping[str, Stored]) -> None:
    """Raises CheckpointError that names a tensor which the config's model needs and which is missing or differs."""
    expected = dict(without_weights(config).named_parameters())
    for name, parameter in expected.items():
        if name not in tensors:
            raise CheckpointError(f"missing tensor for {name}")
        stored = tensors[name]
        if stored.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{stored.file}: {stored.name} has shape {list(stored.shape)}; the config asks for "
                f"{list(parameter.shape)}"
            )
    if unknown := sorted(tensors.keys() - expected.keys()):
        stored = tensors[unknown[0]]
        raise CheckpointError(f"{stored.file}: unexpected tensor {stored.name}")


def check_tokenizer(config: LPAConfig, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError where a tokenizer is of a kind that is not served, or of a larger model."""
    kind = type(tokenizer.model).__name__
    if kind not in ("BPE", "Unigram"):
        raise CheckpointError(f"the tokenizer is a {kind} model; BPE and Unigram are supported")
    if (size := tokenizer.get_vocab_size(with_added_tokens=False)) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {size} tokens and the model {config.vocab_size} (vocab_size): it is another model's"
        )


class _Taken(CheckpointError):
    """Another process writes the same folder."""


def _lock(file: IO[bytes], dst: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            raise FileNotFoundError
    except (BlockingIOError, FileNotFoundError):  # or it has just ended, and the file is the model's
        raise _Taken(f"{dst}: another conversion is writing it") from None


def _identity(config: LPAConfig, tensors: Mapping[str, Stored], dtype: torch.dtype | None) -> dict[str, Any]:
    """What a partial folder must have been begun with to be gone on from."""
    files = {}
    for path in sorted({stored.file for stored in tensors.values()}):
        status = path.stat()
        files[str(path.resolve())] = [status.st_size, status.st_mtime_ns]
    return {"files": files, "dtype": str(dtype), "config": config.to_dict()}


def _begin(partial: Path, file: IO[bytes], identity: dict[str, Any]) -> None:
    """Forget what another source or a whole earlier folder has left."""
    path, text = partial / SOURCE, json.dumps(identity)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        file.truncate(0)
        path.write_text(text, encoding="utf-8")


def _write_weights(
    file: IO[bytes],
    config: LPAConfig,
    tensors: Mapping[str, Stored],
    dtype: torch.dtype | None,
    progress: Progress | None,
) -> None:
    """Append to a safetensors file what is not in it yet; the file's length tells."""
    stored = {name: dataclasses.replace(tensor, dtype=dtype or tensor.dtype) for name, tensor in tensors.items()}
    # wide dtypes first, so that every tensor is aligned
    order = sorted(stored, key=lambda name: -stored[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends, end = [], 0
    for name in order:
        start, end = end, end + math.prod(stored[name].shape) * stored[name].dtype.itemsize
        shape = list(stored[name].shape)
        header[name] = {"dtype": DTYPES[stored[name].dtype], "shape": shape, "data_offsets": [start, end]}
        ends.append(end)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text

    written = os.fstat(file.fileno()).st_size - len(head)
    whole = [end for end in ends if end <= written]
    if written < 0:
        file.truncate(0)
        file.write(head)
    else:
        file.truncate(len(head) + (whole[-1] if whole else 0))
    for name, end in list(zip(order, ends, strict=True))[len(whole) :]:
        source = tensors[name]
        count = 0
        for part in source.parts():
            check_finite(source.file, source.name, part)
            file.write(part.to(stored[name].dtype).contiguous().view(torch.uint8).numpy().data)
            count += part.numel()
        if count != math.prod(source.shape):
            raise CheckpointError(f"{source.file}: {source.name} has {count} numbers, not {math.prod(source.shape)}")
        if progress is not None:
            progress(end, ends[-1])
    file.flush()
    os.fsync(file.fileno())
