"""The files of a model folder, and what can be said of them before torch is imported, which takes a second or more."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

from lpa_model.hf_keys import read_object


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message names the file or the tensor."""


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{folder}: neither model.safetensors nor model.safetensors.index.json")
    return shards(index)


def shards(index: Path) -> list[Path]:
    """The files that a `*.index.json` beside them names; CheckpointError when it is broken or one is missing."""
    try:
        names = sorted(set(read_object(index)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not a shard index: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names a shard {name!r} that is not in the folder")
    return [index.parent / name for name in names]


def weights_hash(folder: Path) -> str:
    """12 hexadecimal digits of the contents of config.json and all weights; about a second for each gigabyte.

    Raises:
        CheckpointError: there are no weights, or a file is empty.
    """
    whole = hashlib.blake2b(digest_size=6)
    for path in (folder / "config.json", *weight_files(folder)):
        if not path.stat().st_size:
            raise CheckpointError(f"{path}: is empty")
        # a file in one call, in which the interpreter runs other threads: parts of it would each wait for them
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            whole.update(hashlib.blake2b(data).digest())
    return whole.hexdigest()
