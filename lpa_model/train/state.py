"""The file that an interrupted run goes on from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

STATE = "state.pt"
"""Its name in the folder of a run."""


def write_state(path: Path, state: dict[str, Any]) -> None:
    """What a run goes on from; the file is replaced whole, and on the disk before it is."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def read_state(path: Path, device: torch.device) -> dict[str, Any] | None:
    """What `write_state` wrote, its tensors on `device`; None where there is no such file.

    Raises:
        ValueError: the file is not one of those.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # RuntimeError, UnpicklingError, EOFError, ...
        raise ValueError(f"{path}: truncated, or not the state of a run; remove it to begin again") from error
    return state
