"""What was computed of a text, kept in a folder for other budgets: pairs at all ranks that pay, and error curves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lpa_model.config import Projection
from lpa_model.convert.stream import check_free
from lpa_model.folder import weights_hash

CURVES = "curves.json"
"""The file of the error curves; the pairs of each layer are in a file of their own (`factorise`)."""

Key = tuple[int, Projection]


def facts(source: Path, windows: Tensor, method: str, multiple: int) -> dict[str, Any]:
    """What pairs and curves depend on: the dense model folder, the text [windows, T], and how errors are weighed."""
    return {
        "source": weights_hash(source),
        "text": hashlib.blake2b(windows.numpy().tobytes(), digest_size=8).hexdigest(),
        "method": method,
        "multiple": multiple,
    }


def curves(folder: Path, wanted: dict[str, Any]) -> dict[Key, list[float]] | None:
    """The error of every matrix at every rank, from 0 up; None if there is no such folder.

    Raises:
        ValueError: the folder holds something else, or is of another model, text or method than `wanted`.
    """
    if not (folder / CURVES).is_file():
        check_free(folder)
        return None
    found = json.loads((folder / CURVES).read_text(encoding="utf-8"))
    if other := [f"{name} {found['facts'].get(name)}" for name in wanted if found["facts"].get(name) != wanted[name]]:
        raise ValueError(f"cuts: {folder} is of {', '.join(other)}: name another folder")
    return {(layer, name): curve for layer, of_layer in enumerate(found["errors"]) for name, curve in of_layer.items()}


@contextmanager
def written(folder: Path, of: dict[str, Any], errors: dict[Key, list[float]]) -> Iterator[Path]:
    """A folder for the pairs; behind the block it becomes `folder`, with `errors`, which the block has filled."""
    new = folder.resolve().with_name(f".{folder.name}.{os.getpid()}.new")
    new.mkdir(parents=True)
    try:
        yield new
        listed: list[dict[str, list[float]]] = [{} for _ in range(1 + max(layer for layer, _ in errors))]
        for (layer, name), curve in errors.items():
            listed[layer][name] = curve
        (new / CURVES).write_text(json.dumps({"facts": of, "errors": listed}) + "\n", encoding="utf-8")
        new.replace(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
