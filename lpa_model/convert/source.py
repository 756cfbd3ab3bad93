"""The weights that a training run has left, wherever and however it did: as tensors under their modules' plain names.

It knows files and names, not models. Pickles are opened for tensors alone.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lpa_model.convert.stream import DTYPES, Stored, row_blocks
from lpa_model.folder import CheckpointError, shards

NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
OTHER_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|trainer|random_states).*|.*_states\.pt")
WRAPPERS = ("model", "module", "state_dict", "model_state_dict", "model_state")
WRAPPING_MODULES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # anywhere in a name


def find_weights(src: Path) -> list[Path]:
    """The weight files of a training folder (its shards, if an index names them); of a file, itself.

    Without weights of its own, a folder's `checkpoint-N` of the largest N is taken.

    Raises:
        CheckpointError: there are none, or more than one could be meant; a DeepSpeed or FSDP folder's message has the
            command that makes one file of it.
    """
    if src.is_file():
        return shards(src) if src.name.endswith(".index.json") else [src]
    if not src.is_dir():
        raise CheckpointError(f"{src}: no such file or folder")
    for path in (src / name for name in NAMES):
        if path.is_file():
            return shards(path) if path.suffix == ".json" else [path]
    others = sorted(
        path
        for path in src.iterdir()
        if path.suffix in SUFFIXES and path.is_file() and not OTHER_STATE.fullmatch(path.name)
    )
    if len(others) == 1:
        return others
    if others:
        raise CheckpointError(f"{src}: has {', '.join(path.name for path in others)}; name the file that is meant")
    if remedy := _unmerged(src):
        raise CheckpointError(f"{src}: {remedy}")
    numbers = [int(match[1]) for path in src.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    if numbers:
        return find_weights(src / f"checkpoint-{max(numbers)}")
    raise CheckpointError(f"{src}: neither model.safetensors nor pytorch_model.bin, nor an index of shards")


def _unmerged(folder: Path) -> str | None:
    """What makes one file of weights that a distributed run has written in parts; None if there are no parts."""
    if (folder / "zero_to_fp32.py").is_file() or any(folder.rglob("*mp_rank_*_model_states.pt")):
        return (
            "DeepSpeed's parts of a model, no weights yet; "
            f"`python {folder / 'zero_to_fp32.py'} {folder} {folder / 'fp32'}` joins them, then convert "
            f"{folder / 'fp32'}"
        )
    parts = sorted(path.parent for path in folder.rglob(".metadata") if any(path.parent.glob("*.distcp")))
    if parts:
        return (
            "FSDP's parts of a model, no weights yet; `python -m torch.distributed.checkpoint.format_utils "
            f"dcp_to_torch {parts[0]} {folder / 'model.pt'}` joins them"
        )
    return None


def read_tensors(src: Path) -> dict[str, Tensor]:
    """The tensors of `find_weights(src)`, without the dictionaries and the prefixes that wrappers put around them.

    Raises:
        CheckpointError: a file is truncated or holds more than floating-point tensors, or a name is there twice.
    """
    found: dict[str, Tensor] = {}
    for path in find_weights(src):
        for name, tensor in _unwrapped(_load(path), path).items():
            for wrapper in WRAPPING_MODULES:
                name = name.replace(wrapper, "")
            if name in found:
                raise CheckpointError(f"{path}: {name} is there twice")
            found[name] = tensor
    return found


def stored_tensors(src: Path) -> dict[str, Stored]:
    """The tensors of `find_weights(src)` by name, each read when it is needed.

    Raises:
        CheckpointError: a file is truncated or holds more than floating-point tensors, or a name is there twice.
    """
    found: dict[str, Stored] = {}
    for path in find_weights(src):
        for name, tensor in (_in_safetensors if path.suffix == ".safetensors" else _in_pickle)(path):
            if name in found:
                raise CheckpointError(f"{path}: {name} is there twice")
            found[name] = tensor
    return found


def _in_safetensors(path: Path) -> Iterator[tuple[str, Stored]]:
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(name)
            if (dtype := part.get_dtype()) not in dtypes:
                raise CheckpointError(f"{path}: {name} holds {dtype}; {', '.join(dtypes)} are supported")
            shape = tuple(part.get_shape())
            yield name, Stored(path, name, shape, dtypes[dtype], partial(_slices, path, name, shape))


def _slices(path: Path, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    with _opened(path) as file:  # for this tensor alone: what is mapped counts as memory of the process
        part = file.get_slice(name)
        for rows in row_blocks(shape):
            yield part[rows]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file: {error}") from error


def _in_pickle(path: Path) -> Iterator[tuple[str, Stored]]:
    for name, tensor in _unwrapped(_load(path), path).items():
        shape = tuple(tensor.shape)
        dtype = tensor.dtype if tensor.dtype in DTYPES else torch.float32
        yield name, Stored(path, name, shape, dtype, partial(_rows, tensor.to(dtype)))


def _rows(tensor: Tensor) -> Iterator[Tensor]:
    for rows in row_blocks(tuple(tensor.shape)):
        yield tensor[rows]


def without_prefix(tensors: dict[str, Tensor], anchor: str) -> dict[str, Tensor]:
    """The tensors under the names that they have inside the module which holds `anchor`: `module.`, `model.` and
    anything else before it are taken away.

    Raises:
        CheckpointError: two modules hold it, or a name would be there twice.
    """
    prefixes = sorted(name.removesuffix(anchor) for name in tensors if f".{name}".endswith(f".{anchor}"))
    if len(prefixes) > 1:
        raise CheckpointError(f"{prefixes[0]}{anchor} and {prefixes[1]}{anchor}: there are two models in it")
    prefix = "".join(prefixes)
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(found) < len(tensors):
        raise CheckpointError(f"names with and without {prefix} before them stand for the same tensor")
    return found


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or not a safetensors file: {error}") from error
    try:
        # tensors stay in the file until they are read, if it is of a kind that can be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises many kinds: UnpicklingError, RuntimeError, EOFError, ...
        raise CheckpointError(
            f"{path}: truncated, or more than tensors in it (`torch.save(model.state_dict(), FILE)` writes these "
            f"alone): {error}"
        ) from error


def _unwrapped(values: Any, path: Path) -> dict[str, Tensor]:
    """The innermost dictionary that holds the model."""
    while isinstance(values, dict):
        inner = next((values[key] for key in WRAPPERS if isinstance(values.get(key), dict)), None)
        if inner is None:
            break
        values = inner
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise CheckpointError(f"{path}: not a dictionary of tensors")
    for name, tensor in values.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} holds {tensor.dtype}, not floating-point numbers")
    return values
