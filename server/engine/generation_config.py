"""A model folder's generation_config.json: where its texts end, and how its authors sample."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lpa_model.checkpoint import read_optional
from lpa_model.folder import CheckpointError

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, math.inf),
    "min_p": (0, 1),
    "repetition_penalty": (1e-6, 100),
}
"""The sampling fields that are read, with the values that requests may have."""

SAYS_NOTHING = frozenset(
    {"_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "do_sample"}
)
"""Keys that are read elsewhere, or describe the file."""


@dataclass(frozen=True)
class GenerationConfig:
    """`sampling` by the names of RANGES; `others` are keys that this server has no use for."""

    eos_token_ids: tuple[int, ...]
    sampling: Mapping[str, float]
    others: tuple[str, ...]

    def defaults(self, source: Literal["auto", "none"]) -> Mapping[str, float]:
        """Fields of `SamplingParams` for requests that do not say otherwise; what of the file is not used is logged."""
        shown = ", ".join(f"{name} {value:g}" for name, value in self.sampling.items())
        if source == "none":
            if shown:
                logger.info("%s: %s are not used; --generation-config auto makes them defaults", FILE, shown)
            return {}
        if shown:
            logger.info("%s: the defaults of requests are %s", FILE, shown)
        if self.others:
            logger.warning("%s: %s are not used: this server does not have them", FILE, ", ".join(self.others))
        return self.sampling


def load_generation_config(folder: Path) -> GenerationConfig:
    """The folder's file, or one that says nothing.

    Raises:
        CheckpointError: it is broken, or a value is out of range; the message names the key.
    """
    path = folder / FILE
    values = {key: value for key, value in read_optional(path).items() if value is not None}
    sampling = {name: _number(path, name, values[name]) for name in RANGES if name in values}
    if values.get("do_sample") is False:
        sampling["temperature"] = 0.0
    others = tuple(sorted(values.keys() - RANGES.keys() - SAYS_NOTHING))
    return GenerationConfig(_token_ids(path, values.get("eos_token_id", [])), sampling, others)


def _token_ids(path: Path, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if type(token) is not int or token < 0:
            raise CheckpointError(f"{path}: eos_token_id {token!r} is not a token id")
    return tuple(ids)


def _number(path: Path, name: str, value: Any) -> float:
    least, most = RANGES[name]
    kinds = (int,) if name == "top_k" else (int, float)
    if type(value) not in kinds or not least <= value <= most:
        raise CheckpointError(f"{path}: {name} {value!r} is not a number from {least:g} to {most:g}")
    number: float = value
    return number
